"""Names and files with scales, as a command line has them: `NAME:SCALE`, `NAME=FILE:SCALE`."""

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

_LORA_SUFFIX = ".safetensors"


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


def lora(text: str) -> tuple[str, float]:
    """PATH or PATH:SCALE, for argparse; the scale is 1 where there is none."""
    return _lora(text, text, "PATH or PATH:SCALE, such as ink.safetensors:0.8")


def variant(text: str) -> tuple[str, tuple[str, float]]:
    """PATH or PATH:SCALE, or NAME= and either, for argparse; without a name it is the file's."""
    allowed = "[NAME=]PATH[:SCALE], such as wash=watercolor.safetensors:0.8"
    name, is_named, rest = text.partition("=")
    # As of `./a=b.safetensors`, where all of it is a path.
    if not is_named or "/" in name:
        path, scale = _lora(text, text, allowed)
        return Path(path).stem, (path, scale)
    if not name:
        raise argparse.ArgumentTypeError(f"{text!r} is not {allowed}")
    return name, _lora(text, rest, allowed)


def scales(given: list[Scaled]) -> list[float] | None:
    """The scale of each, 1 where it has none; None if none has one."""
    if all(it.scale is None for it in given):
        return None
    return [1.0 if it.scale is None else it.scale for it in given]


def _lora(text: str, rest: str, allowed: str) -> tuple[str, float]:
    """The path and the scale of `rest`, which is what `text` has after a name."""
    path, _, end = rest.rpartition(":")
    scale = _number(end)
    # A path may have colons of its own, and ends as all these files do.
    if ":" not in rest or rest.endswith(_LORA_SUFFIX):
        path, scale = rest, 1.0
    if not path or scale is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not {allowed}")
    return path, scale


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
