"""Reads typed, range-checked values out of the raw fields of a request."""

import base64
import binascii
from collections.abc import Mapping
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from darkroom_engine.errors import InvalidRequest

MAX_PROMPT_BYTES = 16_384
MAX_LATENTS = 2**26
"""Numbers that latents given as a starting picture may have."""
PICTURE_FORMATS = ("PNG", "JPEG", "WEBP")

Latents = NDArray[np.float32]
Scalar = bytes | int | float
Field = Scalar | tuple[Scalar, ...]
"""A value, or several where the field may have several."""

_NUMPY_MAGIC = b"\x93NUMPY"


class Reader:
    """The raw fields of a request.

    Every method raises InvalidRequest, with the name of the field, the value and what is allowed.
    """

    def __init__(self, fields: Mapping[str, Field]) -> None:
        self._fields = fields

    def has(self, name: str) -> bool:
        return name in self._fields

    def integer(self, name: str, default: int, low: int, high: int) -> int:
        return _integer(name, self._fields.get(name, default), low, high)

    def number(self, name: str, default: float, low: float, high: float) -> float:
        return _number(name, self._fields.get(name, default), low, high)

    def optional_number(self, name: str, low: float, high: float) -> float | None:
        return self.number(name, low, low, high) if self.has(name) else None

    def pair(self, name: str, default: tuple[int, int], low: int, high: int) -> tuple[int, int]:
        values = self._several(name, default)
        if len(values) != len(default):
            raise InvalidRequest(name, f"{len(values)} numbers, allowed are {len(default)}")
        first, second = (_integer(name, value, low, high) for value in values)
        return first, second

    def numbers(
        self, name: str, default: float, low: float, high: float, count: int
    ) -> list[float]:
        """`count` numbers, each the default if the field was left out."""
        values = self._several(name, (default,) * count)
        self._check_count(name, values, count)
        return [_number(name, value, low, high) for value in values]

    def text(self, name: str, default: str) -> str:
        return _text(name, self._fields.get(name, default.encode()))

    def choice(self, name: str, default: str, choices: tuple[str, ...]) -> str:
        return _choice(name, self.text(name, default), choices)

    def optional_choice(self, name: str, choices: tuple[str, ...]) -> str | None:
        return self.choice(name, "", choices) if self.has(name) else None

    def choices(self, name: str, choices: tuple[str, ...], most: int) -> list[str]:
        """Several of the choices, none if the field was left out."""
        values = self._several(name, ())
        if len(values) > most:
            raise InvalidRequest(name, f"{len(values)} names, allowed are 1 to {most}")
        return [_choice(name, _text(name, value), choices) for value in values]

    def picture(self, name: str) -> Image.Image:
        return _picture(name, self._fields.get(name))

    def pictures(self, name: str, count: int) -> list[Image.Image]:
        values = self._several(name, ())
        self._check_count(name, values, count)
        return [_picture(name, value) for value in values]

    def latents(self, name: str, channels: int) -> Latents | None:
        """(channels, h, w), if the field holds the bytes of a .npy file, else None."""
        raw = _unwrapped(self._fields.get(name))
        if raw is None or not raw.startswith(_NUMPY_MAGIC):
            return None
        try:
            latents = np.load(BytesIO(raw), allow_pickle=False)
        except (ValueError, EOFError, OSError):
            raise InvalidRequest(name, "latents that cannot be read, allowed is a .npy") from None
        shape = list(latents.shape)
        if latents.dtype != np.float32 or latents.ndim != 3 or shape[0] != channels:
            raise InvalidRequest(
                name,
                f"latents of {latents.dtype} and shape {shape}, allowed are float32 and "
                f"[{channels}, height, width]",
            )
        if not 0 < latents.size <= MAX_LATENTS or not np.isfinite(latents).all():
            raise InvalidRequest(
                name, f"latents of shape {shape}, allowed are 1 to {MAX_LATENTS} finite numbers"
            )
        return np.ascontiguousarray(latents)

    def _several(self, name: str, default: tuple[Scalar, ...]) -> tuple[Scalar, ...]:
        value = self._fields.get(name, default)
        return value if isinstance(value, tuple) else (value,)

    def _check_count(self, name: str, values: tuple[Scalar, ...], count: int) -> None:
        if len(values) != count:
            raise InvalidRequest(name, f"{len(values)} given, allowed are {count}, one for a name")


def _integer(name: str, value: object, low: int, high: int) -> int:
    if not isinstance(value, int):
        raise InvalidRequest(name, f"{value!r} is not a whole number")
    if not low <= value <= high:
        raise InvalidRequest(name, f"{value} is out of range, allowed are {low} to {high}")
    return value


def _number(name: str, value: object, low: float, high: float) -> float:
    if not isinstance(value, int | float):
        raise InvalidRequest(name, f"{value!r} is not a number")
    # It arrived as a float32. As it was written, 0.7 of 10 steps is 7, and not 6.9999999.
    with np.errstate(over="ignore"):
        written = float(str(np.float32(value)))
    # A NaN fails every comparison, so that it is refused as well.
    if not low <= written <= high:
        raise InvalidRequest(name, f"{value:g} is out of range, allowed are {low:g} to {high:g}")
    return written


def _text(name: str, raw: object) -> str:
    if not isinstance(raw, bytes):
        raise InvalidRequest(name, f"{raw!r} is not text")
    if len(raw) > MAX_PROMPT_BYTES:
        raise InvalidRequest(
            name, f"{len(raw)} bytes is too long, allowed are 0 to {MAX_PROMPT_BYTES}"
        )
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise InvalidRequest(
            name, f"not UTF-8 text: byte 0x{raw[error.start]:02x} at position {error.start}"
        ) from None


def _choice(name: str, value: str, choices: tuple[str, ...]) -> str:
    if value not in choices:
        existing = f"there are {', '.join(choices)}" if choices else "there are none"
        raise InvalidRequest(name, f"{value!r} does not exist, {existing}")
    return value


def _picture(name: str, value: object) -> Image.Image:
    raw = _unwrapped(value)
    if raw is None:
        raise InvalidRequest(name, "not the bytes of a picture")
    try:
        picture = Image.open(BytesIO(raw), formats=PICTURE_FORMATS)
        picture.load()
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        raise InvalidRequest(
            name, f"{len(raw)} bytes that are no readable picture, allowed are PNG, JPEG, WebP"
        ) from None
    # As the camera was held.
    return ImageOps.exif_transpose(picture)


def _unwrapped(value: object) -> bytes | None:
    """Bytes as they are or, for JSON endpoints, out of base64, also of a data: URL."""
    if not isinstance(value, bytes):
        return None
    text = value
    if text.startswith(b"data:"):
        text = text.partition(b",")[2]
    try:
        # The files that are taken begin with bytes that no base64 has.
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return value
