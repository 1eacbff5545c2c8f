"""What an engine says of itself to the models beside it, in the server's runtime folder."""

import json
import logging
import secrets
from collections.abc import Mapping
from typing import Any

import darkroom_wire as wire

logger = logging.getLogger(__name__)


class Notice:
    """A file that is there while the engine is, and that a newer engine's takes the place of."""

    def __init__(self, model: str) -> None:
        self._path = wire.description_path(model)
        self._inode: int | None = None

    def post(self, description: Mapping[str, Any]) -> None:
        """Put it up, all at once; an engine that cannot goes on without."""
        part = self._path.with_name(f"{self._path.name}.{secrets.token_hex(4)}")
        try:
            part.write_text(json.dumps(description))
            self._inode = part.stat().st_ino
            part.replace(self._path)
        except OSError:
            logger.exception("what may be asked of this engine cannot be told")

    def remove(self) -> None:
        """Take it down, unless it is a newer engine's."""
        try:
            if self._path.stat().st_ino == self._inode:
                self._path.unlink()
        except FileNotFoundError:
            pass
