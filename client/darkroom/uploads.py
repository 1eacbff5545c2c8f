"""Pictures on their way to the server."""

import os
from io import BytesIO
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from darkroom.exceptions import InvalidRequest
from darkroom.latents import NPY_MAGIC, Latents

PictureSource = Image.Image | bytes | str | os.PathLike[str]
"""A PIL image, the bytes of a picture's file, or the path of one."""

_READ_BY_THE_SERVER = ("PNG", "JPEG", "WEBP")
_UNREADABLE = (
    UnidentifiedImageError,
    OSError,
    SyntaxError,
    ValueError,
    Image.DecompressionBombError,
)
_MAY_BE_LATENTS = "image"
_COMPRESS_LEVEL = 1
"""A network moves in milliseconds what a higher one saves in tenths of a second."""
_MAX_SHOWN = 200


def encode(name: str, source: object, mode: str) -> bytes:
    """The file that travels as the field `name`.

    A file travels as it is if the server reads its format, and else as a PNG, as a PIL image does.

    Args:
        source: a `PictureSource` or, as `image`, `Latents`.
        mode: PIL's, of the PNG; a transparency is dropped, as PIL's own conversion does.

    Raises:
        InvalidRequest: the source is none, or cannot be read.
    """
    if isinstance(source, Latents) and name == _MAY_BE_LATENTS:
        return source.to_bytes()
    if isinstance(source, Image.Image):
        return _png(name, "the picture", source, mode)
    if isinstance(source, bytes):
        return _as_file(name, f"{len(source)} bytes", source, mode)
    if isinstance(source, str | os.PathLike):
        return _as_file(name, _shown(source), _read(name, source), mode)
    shown = _shown(" ".join(repr(source).split()))
    raise InvalidRequest(
        f"{name}: {shown} is not a picture, allowed are a PIL image, the bytes of a file and the "
        "path of one"
    )


def _read(name: str, path: str | os.PathLike[str]) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise InvalidRequest(f"{name}: {_shown(path)}: {error.strerror}") from None
    except ValueError as error:  # a null character
        raise InvalidRequest(f"{name}: {_shown(path)!r}: {error}") from None


def _as_file(name: str, what: str, encoded: bytes, mode: str) -> bytes:
    if encoded.startswith(NPY_MAGIC) and name == _MAY_BE_LATENTS:
        return encoded
    try:
        with Image.open(BytesIO(encoded), formats=_READ_BY_THE_SERVER):
            return encoded
    except _UNREADABLE:
        pass
    try:
        with Image.open(BytesIO(encoded)) as opened:
            picture = ImageOps.exif_transpose(opened)
    except _UNREADABLE:
        raise InvalidRequest(f"{name}: {what}: not a picture that can be read") from None
    return _png(name, what, picture, mode)


def _png(name: str, what: str, picture: Image.Image, mode: str) -> bytes:
    buffer = BytesIO()
    try:
        # What a picture carries beside its pixels is nobody's business.
        pixels = picture if picture.mode == mode else picture.convert(mode)
        pixels.save(buffer, "PNG", compress_level=_COMPRESS_LEVEL)
    except _UNREADABLE as error:
        raise InvalidRequest(f"{name}: {what}: {error}") from None
    return buffer.getvalue()


def _shown(value: object) -> str:
    text = str(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."
