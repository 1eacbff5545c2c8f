"""Encoded pictures, and the provenance that they carry."""

import base64
import json
from io import BytesIO

import numpy as np
import pytest
from engine_harness import LIMITS
from PIL import Image

from darkroom_engine import ImageRequest, pictures

PIXELS = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)


def facts(prompt: str = "a bear ☃") -> dict:
    request = ImageRequest.parse(
        {"prompt": prompt.encode(), "negative_prompt": b"blurry", "seed": 7}, LIMITS
    )
    return pictures.provenance(request, 8, "shapes", "0123abcd")


def test_pixels_are_clipped_and_rounded() -> None:
    pixels = np.array([-9.0, -1.0, 0.0, 1.0, 9.0], np.float32).reshape(1, 1, 5).repeat(3, axis=0)

    assert pictures.to_uint8(pixels)[0, :, 0].tolist() == [0, 0, 128, 255, 255]


def test_a_png_tells_how_it_was_made() -> None:
    image = Image.open(BytesIO(pictures.encode(PIXELS, "png", facts())))

    assert json.loads(image.text["darkroom"]) == facts()
    assert image.text["parameters"] == (
        "a bear ☃\nNegative prompt: blurry\n"
        "Steps: 25, Sampler: unipc, CFG scale: 7.5, Seed: 8, Size: 512x512, "
        "Model: shapes, Model hash: 0123abcd"
    )
    np.testing.assert_array_equal(np.asarray(image), PIXELS)


@pytest.mark.parametrize(("output_format", "kind"), [("jpeg", "JPEG"), ("webp", "WEBP")])
def test_other_formats_are_what_they_say(output_format: str, kind: str) -> None:
    assert Image.open(BytesIO(pictures.encode(PIXELS, output_format, facts()))).format == kind


def test_b64_png_is_the_png_in_base64() -> None:
    encoded = pictures.encode(PIXELS, "b64_png", facts())

    assert base64.b64decode(encoded) == pictures.encode(PIXELS, "png", facts())
