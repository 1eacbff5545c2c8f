"""A picture is a PIL image that knows how it came about."""

import copy
import pickle
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from fake_triton import INFO, TIMINGS, encode_picture
from PIL import Image, ImageChops

from darkroom import Picture

FACTS = {**INFO, "model": "shapes", "notes": ["prompt: too long"]}


@pytest.fixture
def picture() -> Picture:
    return Picture.from_bytes(encode_picture(3), 3, FACTS)


def test_it_is_a_pil_image(picture: Picture) -> None:
    assert isinstance(picture, Image.Image)
    assert (picture.size, picture.mode, picture.getpixel((0, 0))) == ((16, 8), "RGB", (3, 20, 30))
    assert np.asarray(picture).shape == (8, 16, 3)


def test_it_knows_how_it_came_about(picture: Picture) -> None:
    assert (picture.seed, picture.model) == (3, "shapes")
    assert (picture.timings, picture.queue_steps) == (TIMINGS, 5)
    assert picture.notes == ["prompt: too long"]
    assert picture.encoded == encode_picture(3)
    assert picture.nsfw_content_detected is None


def test_it_knows_whether_it_was_blacked_out() -> None:
    facts = {**FACTS, "nsfw_content_detected": True}
    picture = Picture.from_bytes(encode_picture(3), 3, facts)

    assert picture.nsfw_content_detected is True
    assert copy.deepcopy(picture).nsfw_content_detected is True


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP"])
def test_all_formats_are_read(file_format: str) -> None:
    encoded = encode_picture(3, (32, 32), file_format)
    picture = Picture.from_bytes(encoded, 3, FACTS)

    with Image.open(BytesIO(encoded)) as opened:
        assert ImageChops.difference(picture, opened).getbbox() is None
    assert picture.encoded == encoded


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_it_is_saved_as_any_image_is(picture: Picture, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"picture{suffix}"
    picture.save(path)

    with Image.open(path) as saved:
        assert saved.size == (16, 8)
        extrema = ImageChops.difference(picture, saved.convert("RGB")).getextrema()
    assert max(high for _, high in extrema) <= 6  # what a lossy format may lose


def test_edited_copies_are_plain_images_with_the_right_pixels(picture: Picture) -> None:
    copied = picture.copy()
    copied.putpixel((0, 0), (255, 255, 255))

    assert picture.getpixel((0, 0)) == (3, 20, 30)
    assert picture.resize((4, 4)).getpixel((1, 1)) == (3, 20, 30)
    assert picture.convert("L").mode == "L"
    assert picture.crop((0, 0, 2, 2)).size == (2, 2)


@pytest.mark.parametrize(
    "through",
    [
        lambda picture: pickle.loads(pickle.dumps(picture)),  # noqa: S301  of our own
        copy.deepcopy,
    ],
    ids=["pickle", "deepcopy"],
)
def test_pickling_and_deep_copies_keep_all(picture: Picture, through: object) -> None:
    twin = through(picture)

    assert isinstance(twin, Picture)
    assert twin.tobytes() == picture.tobytes()
    assert (twin.seed, twin.model, twin.queue_steps) == (3, "shapes", 5)
    assert (twin.timings, twin.notes) == (picture.timings, picture.notes)
    assert twin.encoded == picture.encoded


def test_the_text_of_the_file_is_kept(tmp_path: Path) -> None:
    from PIL.PngImagePlugin import PngInfo

    chunks = PngInfo()
    chunks.add_text("parameters", "a cat\nSteps: 4")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=chunks)
    picture = Picture.from_bytes((tmp_path / "a.png").read_bytes(), 3, FACTS)

    assert picture.info["parameters"] == "a cat\nSteps: 4"


def test_bytes_that_are_no_picture_are_an_os_error() -> None:
    with pytest.raises(OSError, match="cannot identify image file"):
        Picture.from_bytes(b"no picture", 3, FACTS)
