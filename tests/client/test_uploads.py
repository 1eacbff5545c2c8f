"""Pictures become files that the server reads, losslessly, or are refused by field and file."""

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_triton import encode_latents, encode_picture
from PIL import Image, ImageChops

from darkroom import InvalidRequest, Latents, Picture
from darkroom.uploads import encode

GRADIENT = Image.fromarray(np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3))


def opened(encoded: bytes) -> Image.Image:
    with Image.open(BytesIO(encoded)) as image:
        image.load()
    return image


def test_a_pil_image_travels_as_a_png_without_loss() -> None:
    image = opened(encode("image", GRADIENT, "RGB"))

    assert (image.format, image.mode) == ("PNG", "RGB")
    assert image.tobytes() == GRADIENT.tobytes()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16", "F"])
@pytest.mark.parametrize("wanted", ["RGB", "L"])
def test_pil_images_of_any_mode_are_converted(mode: str, wanted: str) -> None:
    source = Image.new(mode, (6, 4), 1)

    assert opened(encode("image", source, wanted)).mode == wanted


def test_a_transparency_is_dropped_and_what_is_under_it_stays() -> None:
    source = GRADIENT.copy()
    source.putalpha(0)

    assert opened(encode("image", source, "RGB")).tobytes() == GRADIENT.tobytes()


def test_the_picture_of_an_answer_can_be_sent_and_its_provenance_is_not() -> None:
    info = {"timings": {}, "queue_steps": 0, "model": "fake", "notes": []}
    picture = Picture.from_bytes(encode_picture(7), 7, info)
    picture.info["parameters"] = "a cat"
    sent = opened(encode("image", picture, "RGB"))

    assert sent.tobytes() == picture.tobytes()
    assert "parameters" not in sent.info


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP"])
def test_a_file_that_the_server_reads_travels_as_it_is(tmp_path: Path, file_format: str) -> None:
    encoded = encode_picture(7, file_format=file_format)
    path = tmp_path / "cat"
    path.write_bytes(encoded)

    for source in (encoded, path, str(path)):
        assert encode("image", source, "RGB") == encoded


@pytest.mark.parametrize("file_format", ["BMP", "TIFF", "GIF"])
def test_a_file_of_another_format_travels_as_a_png(tmp_path: Path, file_format: str) -> None:
    path = tmp_path / "cat"
    GRADIENT.convert("P").convert("RGB").save(path, file_format)
    sent = opened(encode("control_image", path, "RGB"))

    assert sent.format == "PNG"
    with Image.open(path) as source:
        assert ImageChops.difference(sent, source.convert("RGB")).getbbox() is None


def test_a_file_of_another_format_is_turned_as_it_says(tmp_path: Path) -> None:
    path = tmp_path / "cat.tiff"
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    GRADIENT.save(path, exif=exif)

    assert opened(encode("image", path, "RGB")).size == (4, 6)


def test_latents_travel_as_the_image_alone(tmp_path: Path) -> None:
    encoded = encode_latents(7)
    path = tmp_path / "latents.npy"
    path.write_bytes(encoded)

    for source in (Latents.from_bytes(encoded, 7, {}), encoded, path):
        assert encode("image", source, "RGB") == encoded
        with pytest.raises(InvalidRequest, match=r"^mask_image: .*not a picture"):
            encode("mask_image", source, "L")


@pytest.mark.parametrize("name", ["no-such-file.png", "folder", "no\0file"])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    path = str(tmp_path / name)

    with pytest.raises(InvalidRequest) as caught:
        encode("mask_image", path, "L")
    assert str(caught.value).startswith("mask_image: ")
    assert repr(path).strip("'") in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"no picture", encode_picture(7)[:20]])
def test_a_file_that_is_no_picture_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "cat.png"
    path.write_bytes(content)

    with pytest.raises(InvalidRequest, match=f"^image: {path}: not a picture that can be read"):
        encode("image", path, "RGB")
    with pytest.raises(InvalidRequest, match=f"^image: {len(content)} bytes: not a picture"):
        encode("image", content, "RGB")


def test_a_file_that_is_cut_off_is_named(tmp_path: Path) -> None:
    path = tmp_path / "cat.bmp"
    GRADIENT.save(path)
    path.write_bytes(path.read_bytes()[:-20])

    with pytest.raises(InvalidRequest, match=f"^image: {path}: "):
        encode("image", path, "RGB")


def test_a_picture_without_pixels_is_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"^image: the picture: "):
        encode("image", Image.new("RGB", (0, 4)), "RGB")


@pytest.mark.parametrize("source", [7, None, np.zeros((4, 4, 3)), ["cat.png"]])
def test_what_is_no_picture_is_refused(source: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"^image: .* is not a picture, allowed are a PIL"):
        encode("image", source, "RGB")


def test_a_long_text_is_not_repeated() -> None:
    with pytest.raises(InvalidRequest) as caught:
        encode("image", "iVBORw0KGgo" * 1000, "RGB")
    assert len(str(caught.value)) < 300
