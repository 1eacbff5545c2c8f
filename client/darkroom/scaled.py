"""Names with scales, as a command line has them: `NAME:SCALE`, `NAME=FILE:SCALE`."""

import argparse
import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Scaled:
    """A ControlNet with what it follows, or an adapter, and how much it counts."""

    name: str
    file: str | None
    scale: float | None
    """None where none was given."""


def adapter(text: str) -> Scaled:
    """NAME or NAME:SCALE, for argparse."""
    name, colon, number = text.partition(":")
    scale = _number(number)
    if not name or (colon and scale is None):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME or NAME:SCALE, such as ink:0.8")
    return Scaled(name, None, scale)


def control(text: str) -> Scaled:
    """NAME=FILE or NAME=FILE:SCALE, for argparse; a file's name may have colons of its own."""
    name, _, file = text.partition("=")
    start, _, end = file.rpartition(":")
    scale = _number(end) if start else None
    if scale is not None:
        file = start
    if not name or not file:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not NAME=FILE or NAME=FILE:SCALE, such as canny=edges.png:0.8"
        )
    return Scaled(name, file, scale)


def scales(given: list[Scaled]) -> list[float] | None:
    """The scale of each, 1 where it has none; None if none has one."""
    if all(it.scale is None for it in given):
        return None
    return [1.0 if it.scale is None else it.scale for it in given]


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
