"""A line on stderr that tells how far a request has come."""

import sys
import time
from types import TracebackType
from typing import Self

from darkroom.events import Event, Queued, Step


class StepLine:
    """On a terminal, the line changes with every event; elsewhere only its end is written."""

    def __init__(self, task: str) -> None:
        self._task = task

    def __enter__(self) -> Self:
        self._start = time.monotonic()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._write("x" if kind else "+", self._task, end="\n")

    def tell(self, event: Event) -> None:
        """Show what has happened."""
        if not sys.stderr.isatty():
            return
        if isinstance(event, Queued):
            self._write(">", f"{self._task}: waiting, {event.position} ahead")
        elif isinstance(event, Step):
            self._write(">", f"{self._task}: step {event.step} of {event.num_steps}")

    def _write(self, mark: str, text: str, end: str = "") -> None:
        erase = "\x1b[K" if sys.stderr.isatty() else ""
        elapsed_s = time.monotonic() - self._start
        sys.stderr.write(f"\r{mark} {text} {elapsed_s:5.1f} s{erase}{end}")
        sys.stderr.flush()
