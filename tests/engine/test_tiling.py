"""Pictures decoded and encoded tile by tile, with coders whose outputs depend on little around."""

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest

from darkroom_engine.tiling import Array, decode_tiled, encode_tiled, strips

REACH = 2
"""Latents around an output that it depends on."""
FACTOR = 4
CUTS = [(16, 16, 4), (17, 16, 4), (40, 16, 4), (29, 16, 4), (100, 32, 8), (33, 16, 8), (21, 7, 0)]


def blurred(values: Array, reach: int) -> Array:
    """Each element becomes a sum over those around it; outside there are zeros, as for a VAE."""
    height, width = values.shape[2:]
    padded = np.pad(values, ((0, 0), (0, 0), (reach, reach), (reach, reach)))
    total = np.zeros_like(values)
    for down in range(2 * reach + 1):
        for right in range(2 * reach + 1):
            weight = np.float32(1 + down + 3 * right)
            total += weight * padded[:, :, down : down + height, right : right + width]
    return np.sin(total / 50)


def decode(latents: Array) -> Array:
    return blurred(latents, REACH)[:, :3].repeat(FACTOR, axis=2).repeat(FACTOR, axis=3)


def encode(pixels: Array) -> Array:
    return np.tile(blurred(pixels, REACH * FACTOR), (1, 2, 1, 1))[:, :, ::FACTOR, ::FACTOR]


class Watched:
    """A coder, and the shapes that it was called with."""

    def __init__(self, run: Callable[[Array], Array]) -> None:
        self._run = run
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, values: Array) -> Array:
        self.shapes.append(values.shape)
        return self._run(values)


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(0)


def latents(random: np.random.Generator, *shape: int) -> Array:
    return random.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("factor", [1, 8])
@pytest.mark.parametrize(("length", "tile", "overlap"), CUTS)
def test_weights_sum_to_one_everywhere(length: int, tile: int, overlap: int, factor: int) -> None:
    total = np.zeros(length * factor)
    for strip in strips(length, tile, overlap):
        weights = strip.weights(factor)
        assert weights.min() >= 0
        total[strip.span(factor)] += weights

    np.testing.assert_allclose(total, 1, atol=1e-6)


@pytest.mark.parametrize(("length", "tile", "overlap"), CUTS)
def test_strips_are_equal_cover_all_and_overlap_enough(
    length: int, tile: int, overlap: int
) -> None:
    cut = strips(length, tile, overlap)

    assert {strip.stop - strip.start for strip in cut} == {min(length, tile)}
    assert (cut[0].start, cut[-1].stop) == (0, length)
    for before, after in pairwise(cut):
        assert before.stop - after.start >= overlap
        assert after.start <= after.fade_in[0] <= after.fade_in[1] <= before.stop


@pytest.mark.parametrize(("length", "number"), [(16, 1), (17, 2), (28, 2), (29, 3), (40, 3)])
def test_there_are_no_more_strips_than_needed(length: int, number: int) -> None:
    assert len(strips(length, 16, 4)) == number


@pytest.mark.parametrize("size", [(40, 40), (23, 57), (16, 33), (41, 9)])
def test_a_local_decoder_makes_the_same_picture_where_tiles_reach_far_enough(
    random: np.random.Generator, size: tuple[int, int]
) -> None:
    """Each fade keeps a margin of half of what overlaps more, which here is the decoder's reach."""
    given = latents(random, 2, 4, *size)
    expected = decode(given)
    made = decode_tiled(decode, given, FACTOR, tile=16, overlap=4)

    assert made.dtype == np.float32
    assert made.shape == expected.shape
    differs = np.argwhere(np.abs(made - expected).max(axis=(0, 1)) > 0)
    for axis in (0, 1):
        cut = strips(size[axis], 16, 4)
        seams = [(s.fade_in[0] - REACH, s.fade_in[1] + REACH) for s in cut if s.fade_in]
        near = [any(a * FACTOR <= x < b * FACTOR for a, b in seams) for x in differs[:, axis]]
        # Within a seam of the other direction any difference may lie.
        differs = differs[~np.array(near, bool)]
    assert len(differs) == 0


def test_a_decoder_that_sees_no_further_than_the_margin_leaves_no_seam(
    random: np.random.Generator,
) -> None:
    given = latents(random, 1, 4, 26, 26)
    # Two tiles of 16 have 6 in common, of which 2 are faded, with 2 on either side.
    made = decode_tiled(decode, given, FACTOR, tile=16, overlap=2)

    np.testing.assert_allclose(made, decode(given), atol=1e-6)


def test_at_a_seam_a_picture_lies_between_its_tiles() -> None:
    """A decoder that adds its own number to each tile shows what the fade is."""
    numbers = iter(range(2))
    made = decode_tiled(
        lambda _: np.full((1, 3, 8, 16), next(numbers), np.float32),
        np.zeros((1, 4, 8, 28), np.float32),
        1,
        tile=16,
        overlap=4,
    )

    expected = [0.0] * 12 + [0.125, 0.375, 0.625, 0.875] + [1.0] * 12
    assert made[0, 0, 0].tolist() == expected


def test_pictures_are_encoded_as_in_one_piece_but_for_seams(random: np.random.Generator) -> None:
    pixels = latents(random, 1, 3, 26 * FACTOR, 16 * FACTOR)
    made = encode_tiled(encode, pixels, FACTOR, tile=16, overlap=2)

    np.testing.assert_allclose(made, encode(pixels), atol=1e-6)


@pytest.mark.parametrize("size", [(16, 16), (16, 7), (3, 16)])
def test_what_fits_is_one_call_and_the_same_to_the_bit(
    random: np.random.Generator, size: tuple[int, int]
) -> None:
    given = latents(random, 3, 4, *size)
    watched = Watched(decode)
    made = decode_tiled(watched, given, FACTOR, tile=16, overlap=4)

    assert watched.shapes == [given.shape]
    assert made.tobytes() == decode(given).tobytes()


def test_all_calls_have_one_shape_and_one_row(random: np.random.Generator) -> None:
    watched = Watched(decode)
    decode_tiled(watched, latents(random, 2, 4, 23, 40), FACTOR, tile=16, overlap=4)

    assert watched.shapes == [(1, 4, 16, 16)] * 2 * 2 * 3


def test_a_row_is_the_same_whatever_its_neighbours(random: np.random.Generator) -> None:
    given = latents(random, 2, 4, 23, 40)
    together = decode_tiled(decode, given, FACTOR, tile=16, overlap=4)
    alone = decode_tiled(decode, given[1:], FACTOR, tile=16, overlap=4)

    assert together[1].tobytes() == alone[0].tobytes()


@pytest.mark.parametrize(
    ("tile", "overlap", "problem"),
    [
        (0, 0, "tile: 0 is below 1"),
        (16, -1, "overlap: -1 is outside 0 to 8, half of a tile"),
        (16, 9, "overlap: 9 is outside 0 to 8, half of a tile"),
    ],
)
def test_tiles_that_cannot_be_cut_are_refused(tile: int, overlap: int, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        strips(100, tile, overlap)
