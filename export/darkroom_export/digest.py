"""What pins a file by its contents."""

import hashlib
from pathlib import Path

from darkroom_export.errors import ExportError


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal.

    Raises:
        ExportError: it cannot be read.
    """
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise ExportError(f"{path}: {error.strerror}") from None
