"""Pictures that are too large for the VAE in one piece: tile by tile, and faded into each other."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise, product

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Run = Callable[[Array], Array]


def decode_tiled(decode: Run, latents: Array, scale_factor: int, tile: int, overlap: int) -> Array:
    """Latents (B, C, h, w) to pixels (B, 3, f * h, f * w), f being `scale_factor`.

    What fits into one tile is decoded as it is, in one call. Otherwise every call gets one row of
    one tile, all of the same size. What is further from a seam than half of `overlap` is of one
    tile alone. Tiles know nothing of each other, so that what a network takes from the whole
    picture, such as the statistics of its normalisations, differs between them.

    Args:
        decode: takes latents of any number of rows, as they are.
        tile: the largest side of a tile, in latents.
        overlap: over how many latents neighbours are faded into each other.

    Raises:
        ValueError: no tiles can be cut so.
    """
    return _run_tiled(decode, latents, tile, overlap, taken=1, made=scale_factor)


def encode_tiled(encode: Run, pixels: Array, scale_factor: int, tile: int, overlap: int) -> Array:
    """Pixels (B, 3, f * h, f * w) to what the encoder says of latents (B, 2C, h, w).

    Everything else is as in `decode_tiled`.
    """
    return _run_tiled(encode, pixels, tile, overlap, taken=scale_factor, made=1)


@dataclass(frozen=True)
class Strip:
    """The tiles of one row or of one column, all across the other direction, in latents."""

    start: int
    stop: int
    fade_in: tuple[int, int] | None
    """From where to where it takes over from the one before; the first has none."""
    fade_out: tuple[int, int] | None

    def span(self, factor: int) -> slice:
        """Where it is, in elements of which `factor` make a latent."""
        return slice(self.start * factor, self.stop * factor)

    def weights(self, factor: int) -> Array:
        """How much each of its elements counts; over all strips the sum is one everywhere."""
        # What has taken over from the one before, and not yet given way to the one after: also
        # where the next fade begins before this one has ended.
        size = factor * (self.stop - self.start)
        weights = np.ones(size) if self.fade_in is None else self._ramp(self.fade_in, factor)
        if self.fade_out is not None:
            weights = weights - self._ramp(self.fade_out, factor)
        return weights.astype(np.float32)

    def _ramp(self, fade: tuple[int, int], factor: int) -> NDArray[np.float64]:
        """0 before the fade, 1 after it."""
        start, stop = fade
        middles = np.arange(self.start * factor, self.stop * factor) + 0.5
        # A fade of no width is a step.
        width = (stop - start) * factor or 0.5
        return np.clip((middles - start * factor) / width, 0.0, 1.0)


def strips(length: int, tile: int, overlap: int) -> list[Strip]:
    """Cut `length` latents into equal strips of at most `tile`, which overlap by no less than that.

    Raises:
        ValueError: `tile` or `overlap` is out of range.
    """
    if tile < 1:
        raise ValueError(f"tile: {tile} is below 1")
    if not 0 <= overlap <= tile // 2:
        raise ValueError(f"overlap: {overlap} is outside 0 to {tile // 2}, half of a tile")
    if length <= tile:
        return [Strip(0, length, None, None)]
    number = -(-(length - overlap) // (tile - overlap))
    starts = [index * (length - tile) // (number - 1) for index in range(number)]
    # In the middle of what both have: a network's edge effects are at the tiles' ends.
    fades: list[tuple[int, int] | None] = []
    for before, after in pairwise(starts):
        start = (before + tile + after - overlap) // 2
        fades.append((start, start + overlap))
    return [
        Strip(start, start + tile, fade_in, fade_out)
        for start, fade_in, fade_out in zip(starts, [None, *fades], [*fades, None], strict=True)
    ]


def _run_tiled(run: Run, whole: Array, tile: int, overlap: int, *, taken: int, made: int) -> Array:
    """Run `whole` (B, ..., H, W); `taken` and `made` of its elements in and out make a latent."""
    height, width = (side // taken for side in whole.shape[2:])
    rows, columns = strips(height, tile, overlap), strips(width, tile, overlap)
    if len(rows) == len(columns) == 1:
        return run(whole)
    tiles = list(product(rows, columns))
    results = []
    for picture in whole:
        pieces = [picture[None, :, row.span(taken), column.span(taken)] for row, column in tiles]
        outputs = [run(np.ascontiguousarray(piece))[0] for piece in pieces]
        result = np.zeros((len(outputs[0]), made * height, made * width), np.float32)
        for (row, column), output in zip(tiles, outputs, strict=True):
            weights = np.outer(row.weights(made), column.weights(made))
            result[:, row.span(made), column.span(made)] += weights * output
        results.append(result)
    return np.stack(results)
