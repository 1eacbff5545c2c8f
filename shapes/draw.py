"""The shapes data set: one coloured shape on a plain background, drawn from a specification.

A :class:`Spec` fixes what the words of a caption can say (shape, colour, size, background) and
what they cannot (the exact radius and the centre). :func:`draw` renders it, :func:`caption` words
it, and :func:`is_held_out` tells which combinations of words no training picture shows.
"""

import hashlib
import itertools
import math
import random
from dataclasses import dataclass
from typing import NamedTuple

from PIL import Image, ImageDraw

IMAGE_SIZE = 128
"""Width and height of a drawing, in pixels."""

SUPERSAMPLING = 4
"""Each pixel is the mean of this many by this many samples."""

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 40),
    "green": (30, 150, 60),
    "blue": (40, 80, 225),
    "yellow": (250, 220, 50),
    "purple": (150, 40, 160),
    "orange": (245, 135, 25),
    "white": (250, 250, 250),
    "black": (15, 15, 15),
}
"""Colour names and their 8-bit sRGB values."""

SIZES: dict[str, tuple[float, float]] = {"small": (19.0, 24.0), "large": (39.0, 48.0)}
"""Size names and the range of the circumscribed radius, in pixels."""

HELD_OUT_FRACTION = 0.1

RING_HOLE = 0.55
"""Radius of a ring's hole relative to its outer radius."""

_STAR_WAIST = 0.42
_ARM = 0.3
_MARGIN = 5.0
_MAX_OFFSET = 20.0
_WITHOUT_SIZE = 0.35
_WITHOUT_BACKGROUND = 0.175


class Combination(NamedTuple):
    """What the words of a full caption say."""

    shape: str
    colour: str
    size: str
    background: str


@dataclass(frozen=True)
class Spec:
    """What a drawing shows; ``radius`` (circumscribed) and ``centre`` (x, y) are in pixels."""

    shape: str
    colour: str
    size: str
    background: str
    radius: float
    centre: tuple[float, float]


def combinations() -> list[Combination]:
    """All (shape, colour, size, background) with the shape's colour unlike the background's."""
    return [
        Combination(shape, colour, size, background)
        for shape, colour, size, background in itertools.product(SHAPES, COLOURS, SIZES, COLOURS)
        if colour != background
    ]


def is_held_out(combination: Combination) -> bool:
    """Whether the combination is kept out of training; a fixed function of its four words."""
    digest = hashlib.sha256(" ".join(combination).encode()).digest()
    return int.from_bytes(digest[:4], "big") < HELD_OUT_FRACTION * 2**32


def split() -> tuple[list[Combination], list[Combination]]:
    """The combinations seen in training and those held out, each in a stable order."""
    everything = combinations()
    seen = [c for c in everything if not is_held_out(c)]
    return seen, [c for c in everything if is_held_out(c)]


def jitter(combination: Combination, rng: random.Random) -> Spec:
    """A specification of the combination with a random radius and a random centre."""
    shape, colour, size, background = combination
    radius = rng.uniform(*SIZES[size])
    offset = min(_MAX_OFFSET, IMAGE_SIZE / 2 - _MARGIN - radius)
    middle = IMAGE_SIZE / 2
    centre = (middle + rng.uniform(-offset, offset), middle + rng.uniform(-offset, offset))
    return Spec(shape, colour, size, background, radius, centre)


def caption(combination: Combination, rng: random.Random) -> str:
    """One of many wordings of the combination; some leave out the size, the background or both."""
    shape, colour, size, background = combination
    subject = f"{colour} {shape}"
    if rng.random() >= _WITHOUT_SIZE:
        subject = rng.choice((f"{size} {subject}", f"{size} {subject}", f"{size}, {subject}"))
    if rng.random() < 0.5:
        article = "an" if subject[0] in "aeiou" else "a"
        subject = f"{article} {subject}"
    ending = ""
    if rng.random() >= _WITHOUT_BACKGROUND:
        article = "an" if background[0] in "aeiou" else "a"
        ending = rng.choice(
            (
                f" on {article} {background} background",
                f" on {article} {background} background",
                f" on {background} background",
                f" on {background}",
                f", {background} background",
            )
        )
    opening = rng.choice(("", "", "", "", "a picture of ", "a drawing of "))
    return f"{opening}{subject}{ending}"


def prompt(combination: Combination) -> str:
    """The full wording that names everything: ``a large red circle on a blue background``."""
    shape, colour, size, background = combination
    article = "an" if background[0] in "aeiou" else "a"
    return f"a {size} {colour} {shape} on {article} {background} background"


def _polygon(shape: str) -> list[tuple[float, float]]:
    """Corners of a polygonal shape in its unit circle, x to the right and y down."""
    if shape == "square":
        half = math.sqrt(0.5)
        return [(-half, -half), (half, -half), (half, half), (-half, half)]
    if shape == "cross":
        arm, long = _ARM, math.sqrt(1 - _ARM**2)
        corners = [(arm, -long), (arm, -arm), (long, -arm)]
        turned = [corners]
        for _ in range(3):
            turned.append([(-y, x) for x, y in turned[-1]])
        return [corner for quarter in turned for corner in quarter]
    count, inner = {"triangle": (3, None), "star": (5, _STAR_WAIST)}[shape]
    angles = [2 * math.pi * i / count - math.pi / 2 for i in range(count)]
    corners = []
    for angle in angles:
        corners.append((math.cos(angle), math.sin(angle)))
        if inner is not None:
            between = angle + math.pi / count
            corners.append((inner * math.cos(between), inner * math.sin(between)))
    return corners


def mask(shape: str, radius: float, centre: tuple[float, float]) -> Image.Image:
    """The shape's coverage as an ``L`` image of 128 x 128 pixels, 255 inside."""
    scale = SUPERSAMPLING
    canvas = Image.new("L", (IMAGE_SIZE * scale, IMAGE_SIZE * scale), 0)
    pen = ImageDraw.Draw(canvas)
    x, y, r = centre[0] * scale, centre[1] * scale, radius * scale
    if shape in ("circle", "ring"):
        pen.ellipse((x - r, y - r, x + r, y + r), fill=255)
        if shape == "ring":
            r *= RING_HOLE
            pen.ellipse((x - r, y - r, x + r, y + r), fill=0)
    else:
        pen.polygon([(x + r * px, y + r * py) for px, py in _polygon(shape)], fill=255)
    return canvas.reduce(scale)


def draw(spec: Spec) -> Image.Image:
    """Render the specification as an antialiased RGB image of 128 x 128 pixels."""
    image = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), COLOURS[spec.background])
    image.paste(COLOURS[spec.colour], mask=mask(spec.shape, spec.radius, spec.centre))
    return image
