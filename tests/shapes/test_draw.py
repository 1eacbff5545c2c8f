"""The drawings, their captions and the split."""

import random

import numpy as np
import pytest

from shapes.draw import (
    COLOURS,
    HELD_OUT_FRACTION,
    IMAGE_SIZE,
    SHAPES,
    SIZES,
    Combination,
    caption,
    combinations,
    draw,
    is_held_out,
    jitter,
    mask,
    prompt,
    split,
)


def test_combinations_are_complete_and_never_colour_on_itself() -> None:
    everything = combinations()
    assert len(everything) == len(set(everything)) == len(SHAPES) * len(SIZES) * 8 * 7
    assert all(colour != background for _, colour, _, background in everything)


def test_split_is_disjoint_complete_and_stable() -> None:
    seen, held_out = split()
    assert not set(seen) & set(held_out)
    assert set(seen) | set(held_out) == set(combinations())
    assert split() == (seen, held_out)
    assert len(held_out) == pytest.approx(HELD_OUT_FRACTION * len(combinations()), rel=0.3)
    # The committed checkpoint was trained with this very split.
    assert (len(seen), len(held_out)) == (598, 74)
    assert held_out[0] == ("circle", "red", "small", "green")
    assert is_held_out(held_out[0])
    assert not is_held_out(seen[0])


def test_every_word_occurs_in_training() -> None:
    seen, _ = split()
    for column, words in enumerate((SHAPES, COLOURS, SIZES, COLOURS)):
        assert {combination[column] for combination in seen} == set(words)


@pytest.mark.parametrize("shape", SHAPES)
def test_shape_is_inside_its_circle_and_the_image(shape: str) -> None:
    rng = random.Random(shape)
    for size in SIZES:
        spec = jitter(Combination(shape, "red", size, "white"), rng)
        coverage = np.asarray(mask(shape, spec.radius, spec.centre))
        rows, columns = np.nonzero(coverage)
        distance = np.hypot(columns + 0.5 - spec.centre[0], rows + 0.5 - spec.centre[1])
        assert distance.max() <= spec.radius + 1.5
        assert min(rows.min(), columns.min()) > 0
        assert max(rows.max(), columns.max()) < IMAGE_SIZE - 1


def test_drawing_has_the_named_colours_and_is_reproducible() -> None:
    combination = Combination("circle", "purple", "large", "yellow")
    image = draw(jitter(combination, random.Random(3)))
    assert image.mode == "RGB"
    assert image.size == (IMAGE_SIZE, IMAGE_SIZE)
    assert image.getpixel((0, 0)) == COLOURS["yellow"]
    assert image.getpixel((64, 64)) == COLOURS["purple"]
    assert image.tobytes() == draw(jitter(combination, random.Random(3))).tobytes()


def test_edges_are_antialiased() -> None:
    assert set(np.unique(np.asarray(mask("circle", 40.0, (64.3, 63.8))))) - {0, 255}


def test_captions_vary_and_always_name_colour_and_shape() -> None:
    combination = Combination("star", "orange", "small", "blue")
    rng = random.Random(0)
    captions = {caption(combination, rng) for _ in range(500)}
    assert len(captions) > 20
    assert all("orange star" in text for text in captions)
    assert any("small" not in text and "blue" not in text for text in captions)
    assert any("small" in text and "blue background" in text for text in captions)
    assert not any("a orange" in text for text in captions)


def test_prompt_names_everything() -> None:
    assert prompt(Combination("ring", "red", "large", "orange")) == (
        "a large red ring on an orange background"
    )
