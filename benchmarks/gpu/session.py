"""What has been measured so far, and the time that is left for the rest."""

import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.environment import write_result

GRACE_S = 20.0
"""After the end of the time, until a part that does not end is given up with the process."""


class Session:
    """Runs parts one after the other, and writes the result file after each.

    A part that fails leaves its error in the file, and the next one runs. One for which there is
    too little time left is dropped, with a note.
    """

    def __init__(self, path: Path, result: dict[str, Any], budget_s: float) -> None:
        self._path = path
        self.result = result
        self._end = time.monotonic() + budget_s
        self.num_failed = 0
        self.result |= {"notes": [], "errors": {}, "seconds": {}}
        self._lock = threading.Lock()
        self._running = ""
        self._watchdog = threading.Timer(budget_s + GRACE_S, self._give_up)
        self._watchdog.daemon = True
        self._watchdog.start()
        self.write()

    @property
    def left_s(self) -> float:
        """Seconds until the end of the time."""
        return self._end - time.monotonic()

    def note(self, text: str) -> None:
        """Something that who reads the result must know."""
        print(f"note: {text}", file=sys.stderr, flush=True)  # noqa: T201  a command's progress
        self.result["notes"].append(text)

    def run(
        self, name: str, needed_s: float, part: Callable[[], Any], store: dict[str, Any]
    ) -> None:
        """Run a part whose result belongs into `store`, under the last part of its name."""
        if self.left_s < needed_s:
            self.note(f"{name}: dropped, {self.left_s:.0f} s are left and it takes {needed_s:.0f}")
            return
        print(f"{name} ...", file=sys.stderr, flush=True)  # noqa: T201  a command's progress
        self._running = name
        start = time.monotonic()
        try:
            store[name.rpartition("/")[2]] = part()
        except Exception as error:  # noqa: BLE001  whatever it is, the other parts are wanted
            traceback.print_exc()
            self.num_failed += 1
            self.result["errors"][name] = f"{type(error).__name__}: {error}"
        self.result["seconds"][name] = round(time.monotonic() - start, 1)
        self.write()

    def rounds(self, count: int) -> Iterator[int]:
        """Numbers up to `count`, at least one, but no further ones when the time is over."""
        for number in range(count):
            if number and self.left_s < 0:
                self.note(f"{self._running}: {number} of {count} rounds, for want of time")
                return
            yield number

    def write(self) -> None:
        with self._lock:
            write_result(self._path, self.result)

    def close(self) -> None:
        self._watchdog.cancel()
        self.write()

    def _give_up(self) -> None:
        self.note(f"{self._running}: given up, it did not end in time")
        self.write()
        # Whatever hangs would keep an orderly end from coming.
        os._exit(1)
