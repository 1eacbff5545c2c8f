"""The pixel classifier: right on drawings, silent on everything else."""

import random

import numpy as np
import pytest
from PIL import Image, ImageFilter

from shapes.classify import UNKNOWN, Reading, classify
from shapes.draw import COLOURS, IMAGE_SIZE, Combination, combinations, draw, jitter


def test_reads_drawings() -> None:
    rng = random.Random(0)
    right = [classify(draw(jitter(c, rng))) == Reading(*c) for c in combinations()]
    assert np.mean(right) >= 0.99


def test_reads_blurred_and_noisy_drawings() -> None:
    rng = random.Random(1)
    noise = np.random.default_rng(1)
    right = []
    for combination in rng.sample(combinations(), 100):
        image = draw(jitter(combination, rng)).filter(ImageFilter.GaussianBlur(1.5))
        pixels = np.asarray(image, np.float32) + noise.normal(0, 6, (IMAGE_SIZE, IMAGE_SIZE, 3))
        image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        right.append(classify(image) == Reading(*combination))
    assert np.mean(right) >= 0.97


def test_reads_other_sizes_and_modes() -> None:
    combination = Combination("triangle", "green", "large", "white")
    image = draw(jitter(combination, random.Random(2)))
    assert classify(image.resize((256, 256)).convert("RGBA")) == Reading(*combination)


@pytest.mark.parametrize("seed", range(5))
def test_noise_is_unknown(seed: int) -> None:
    noise = np.random.default_rng(seed).integers(0, 256, (IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    assert classify(Image.fromarray(noise)) == Reading()


@pytest.mark.parametrize("name", COLOURS)
def test_blank_image_has_a_background_only(name: str) -> None:
    blank = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), COLOURS[name])
    assert classify(blank) == Reading(background=name)


def test_grey_is_no_colour_of_the_palette() -> None:
    assert classify(Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), (128, 128, 128))) == Reading()


def test_two_shapes_are_not_one() -> None:
    image = draw(jitter(Combination("circle", "red", "small", "white"), random.Random(0)))
    image.paste(COLOURS["red"], (4, 4, 44, 44))
    assert classify(image).shape == UNKNOWN
