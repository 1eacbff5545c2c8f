"""What tritonserver says, and what of it explains a failure."""

import os
import re
from pathlib import Path
from typing import BinaryIO

_TAIL_BYTES = 1 << 20
_ERROR = re.compile(r"(E\d{4} |error:)")
_NOISE = "CudaDriverHelper"
"""In an error line of every server on a machine without a GPU, which is none."""


class ServerLog:
    """A log file that is appended to; `problems` looks at the last run only."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._run_begins_at = 0

    def open(self) -> BinaryIO:
        """Open the file for another run.

        Raises:
            OSError: it cannot be written.
        """
        stream = self.path.open("ab")
        self._run_begins_at = stream.seek(0, os.SEEK_END)
        return stream

    def problems(self) -> list[str]:
        """The last few errors of this run, one line each."""
        text = self._last_run()
        if text.startswith("Usage:"):
            # Of an option that it does not take, Triton tells behind a list of all that it does.
            return [line for line in text.strip().split("\n\n")[-1].splitlines() if line]
        lines = [line for line in text.splitlines() if _ERROR.match(line)]
        # Triton prints a Python traceback with escaped line ends behind its one telling sentence.
        sentences = [line.split("\\n\\nAt:")[0] for line in lines if _NOISE not in line]
        return [*dict.fromkeys(sentences[-4:])]

    def _last_run(self) -> str:
        try:
            with self.path.open("rb") as stream:
                end = stream.seek(0, os.SEEK_END)
                stream.seek(max(self._run_begins_at, end - _TAIL_BYTES))
                return stream.read().decode(errors="replace")
        except OSError:
            return ""
