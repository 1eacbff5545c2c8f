"""Ends the requests that nobody waits for any more, while the engine is busy with a step."""

import logging
import threading
import time
from collections.abc import Callable

from darkroom_engine.errors import DeadlineExceeded
from darkroom_engine.job import Job

POLL_S = 0.02
MAX_SHARE = 0.1
"""Of the time, that asking may take: each question can be a round trip to the server process."""

logger = logging.getLogger(__name__)

IsAbandoned = Callable[[], bool]


class Watcher:
    """The jobs in flight, on a thread that fails them at their deadline or when they are abandoned.

    The samples of such a job leave at the next step; its caller has the answer at once.
    """

    def __init__(self) -> None:
        self._watched: dict[Job, IsAbandoned] = {}
        self._changed = threading.Condition()
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="watcher", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    def watch(self, job: Job, is_abandoned: IsAbandoned) -> None:
        """Watch a job until it is over; `is_abandoned` is asked again and again till then."""
        with self._changed:
            self._watched[job] = is_abandoned
            self._changed.notify()

    def jobs(self) -> list[Job]:
        """Those that are not over."""
        with self._changed:
            return [job for job in self._watched if not job.is_over]

    def _run(self) -> None:
        ask_at = 0.0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_closing, timeout=POLL_S)
                self._changed.wait_for(lambda: self._watched or self._is_closing)
                if self._is_closing:
                    return
                self._watched = {job: ask for job, ask in self._watched.items() if not job.is_over}
                watched = list(self._watched.items())
            now = time.monotonic()
            for job, _ in watched:
                if job.deadline is not None and now >= job.deadline:
                    job.fail(DeadlineExceeded(f"timeout_ms: {job.request.timeout_ms} ran out"))
            if now < ask_at:
                continue
            for job, is_abandoned in watched:
                self._ask(job, is_abandoned)
            end = time.monotonic()
            ask_at = end + (end - now) / MAX_SHARE

    @staticmethod
    def _ask(job: Job, is_abandoned: IsAbandoned) -> None:
        try:
            if not job.is_over and is_abandoned():
                job.cancel()
        except Exception:
            # One caller that cannot be asked must not keep the others from being asked.
            logger.exception("this is a bug")
