"""Read shape, colour, size and background off a picture, by rule and without a neural network.

The background is the palette colour of the border, the shape's colour the commonest other palette
colour. The shape is the one whose ideal drawing, laid over the coloured area with the same centre
of mass and the same area, overlaps it best. What is not clear is read as ``"unknown"``.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from shapes.draw import COLOURS, IMAGE_SIZE, SHAPES, SIZES, mask

UNKNOWN = "unknown"

COLOUR_TOLERANCE = 55.0
"""Largest distance in RGB, on the 8-bit scale, at which a pixel counts as a palette colour."""

MIN_BORDER = 0.6
"""Least fraction of the border that is of the background's colour."""

MIN_AREA = 150
"""Fewest pixels a shape is made of."""

MIN_OVERLAP = 0.7
MIN_LEAD = 0.02
"""Least overlap of the best shape, and least lead over the second best."""

_BORDER = 4
_NAMES = tuple(COLOURS)
_PALETTE = np.array([COLOURS[name] for name in _NAMES], dtype=np.float32)
_SIZE_LIMIT = (SIZES["small"][1] + SIZES["large"][0]) / 2


def _unit_area(shape: str) -> float:
    """Area of the shape relative to its squared circumscribed radius."""
    radius = IMAGE_SIZE / 2.5
    centre = (IMAGE_SIZE / 2, IMAGE_SIZE / 2)
    return float(np.asarray(mask(shape, radius, centre), np.float32).sum() / 255 / radius**2)


_UNIT_AREA = {shape: _unit_area(shape) for shape in SHAPES}


@dataclass(frozen=True)
class Reading:
    """The words that describe a picture; each is ``"unknown"`` where the picture is not clear."""

    shape: str = UNKNOWN
    colour: str = UNKNOWN
    size: str = UNKNOWN
    background: str = UNKNOWN


def _overlap(coverage: NDArray[np.float32], shape: str) -> tuple[float, float]:
    """Intersection over union of the coverage with the ideal shape, and that shape's radius."""
    area = float(coverage.sum())
    rows, columns = np.mgrid[0:IMAGE_SIZE, 0:IMAGE_SIZE] + 0.5
    centre = (float((coverage * columns).sum()) / area, float((coverage * rows).sum()) / area)
    radius = math.sqrt(area / _UNIT_AREA[shape])
    ideal = np.asarray(mask(shape, radius, centre), np.float32) / 255
    overlap = np.minimum(coverage, ideal).sum() / np.maximum(coverage, ideal).sum()
    return float(overlap), radius


def classify(image: Image.Image) -> Reading:
    """Read a picture of any size and mode; pictures other than 128 x 128 are resized first."""
    image = image.convert("RGB")
    if image.size != (IMAGE_SIZE, IMAGE_SIZE):
        image = image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX)
    pixels = np.asarray(image, dtype=np.float32)
    distances = np.linalg.norm(pixels[:, :, None] - _PALETTE, axis=-1)
    labels = np.where(distances.min(-1) <= COLOUR_TOLERANCE, distances.argmin(-1), -1)

    inside = np.zeros(labels.shape, dtype=bool)
    inside[_BORDER:-_BORDER, _BORDER:-_BORDER] = True
    border = labels[~inside]
    counts = np.bincount(border[border >= 0], minlength=len(_NAMES))
    background = int(counts.argmax())
    if counts[background] < MIN_BORDER * border.size:
        return Reading()

    counts = np.bincount(labels[labels >= 0], minlength=len(_NAMES))
    counts[background] = 0
    colour = int(counts.argmax())
    if counts[colour] < MIN_AREA / 2:
        return Reading(background=_NAMES[background])

    # How far each pixel lies on the way from the background's colour to the shape's.
    origin = np.median(pixels[labels == background], axis=0)
    way = np.median(pixels[labels == colour], axis=0) - origin
    coverage = np.clip(((pixels - origin) @ way) / float(way @ way), 0, 1)
    coverage[coverage < 0.25] = 0
    if coverage.sum() < MIN_AREA:
        return Reading(background=_NAMES[background])

    ranked = sorted(((*_overlap(coverage, shape), shape) for shape in SHAPES), reverse=True)
    (best, radius, shape), (second, _, _) = ranked[:2]
    if best < MIN_OVERLAP or best - second < MIN_LEAD:
        return Reading(colour=_NAMES[colour], background=_NAMES[background])
    size = "small" if radius < _SIZE_LIMIT else "large"
    return Reading(shape, _NAMES[colour], size, _NAMES[background])
