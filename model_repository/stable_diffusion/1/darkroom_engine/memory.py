"""How much memory there is, and how many rows of a UNet call fit into it."""

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

SAMPLE_S = 0.005
USABLE = 0.8
"""Of the memory that is free at the start; the rest is for the decoder and the system."""

logger = logging.getLogger(__name__)

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


def available_bytes(meminfo: Path = _MEMINFO, cgroup: Path = _CGROUP) -> int:
    """Host memory that could be taken now without swapping, within the container's limit."""
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    try:
        limit = (cgroup / "memory.max").read_text().strip()
        used = int((cgroup / "memory.current").read_text())
        stat = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    except OSError:  # no cgroup of version 2, or the root one, which has no limit
        return available
    if limit == "max":
        return available
    # Pages of files count as used, but are given back when memory is short.
    return min(available, int(limit) - used + int(stat.get("inactive_file", 0)))


class MemoryMeter:
    """The most memory that was taken while its block ran: `used_bytes`, of the whole system.

    Of the system, because the networks run in other processes, and which depends on the backend.
    """

    def __init__(self, available: Callable[[], int] = available_bytes) -> None:
        self._available = available
        self._is_done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memory-meter", daemon=True)
        self.used_bytes = 0

    def __enter__(self) -> Self:
        self._start = self._available()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_done.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            is_last = self._is_done.is_set()
            self.used_bytes = max(self.used_bytes, self._start - self._available())
            if is_last:
                return
            time.sleep(SAMPLE_S)


def rows_that_fit(
    denoise: Callable[[int], None],
    most: int,
    available: Callable[[], int] = available_bytes,
) -> int:
    """Rows of a UNet call that fit into memory, 2 to `most`, from calls with 1 and with 2 rows.

    Args:
        denoise: runs a UNet call of that many rows.
    """
    free = available()
    per_row = 1.0
    for rows in (1, 2):
        with MemoryMeter(available) as meter:
            denoise(rows)
        # A backend may keep what its first call took, and the second needs only more of it: the
        # larger of both is what a row takes at the most.
        per_row = max(per_row, meter.used_bytes / rows)
    fitting = int(USABLE * free / per_row)
    chosen = max(2, min(most, fitting))
    logger.info(
        "max_rows is %d: a row takes %.0f MB, %.0f MB are free", chosen, per_row / 1e6, free / 1e6
    )
    return chosen
