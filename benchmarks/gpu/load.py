"""Requests that come at given times, to whoever serves them."""

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future

from benchmarks.gpu.grouping import is_guided
from benchmarks.gpu.service import Answered, Service
from benchmarks.gpu.summary import Visit
from benchmarks.workload import Request


def send(
    service: Service, requests: Sequence[Request], arrivals_s: Sequence[float], drain_s: float
) -> tuple[list[Visit], float]:
    """Send each request when it is due, and wait for the answers, but not for ever.

    Args:
        arrivals_s: from the start, rising; one for each request.
        drain_s: how long to wait after the last of them before the rest is given up.

    Returns:
        What became of each request, and when the rest was given up, in seconds from the start.

    Raises:
        EngineError: a request failed.
    """
    start = time.perf_counter()
    futures: list[Future[Answered]] = []
    for request, due_s in zip(requests, arrivals_s, strict=True):
        _sleep_until(start + due_s)
        futures.append(service.submit(request))
    is_done = _Countdown(futures)
    is_done.wait(drain_s)
    end_s = time.perf_counter() - start
    answered = [future.result() if future.done() else None for future in futures]
    service.give_up()
    visits = [
        # When it was due: that a busy host sends late is no merit of the service.
        Visit(
            due_s,
            None if answer is None else answer.at_s - start,
            request.num_inference_steps,
            is_guided(request),
        )
        for request, due_s, answer in zip(requests, arrivals_s, answered, strict=True)
    ]
    return visits, end_s


class _Countdown:
    """Waits until every future of some has ended."""

    def __init__(self, futures: Sequence["Future[Answered]"]) -> None:
        self._left = len(futures)
        self._is_over = threading.Event()
        self._lock = threading.Lock()
        if not futures:
            self._is_over.set()
        for future in futures:
            future.add_done_callback(self._count)

    def wait(self, timeout_s: float) -> None:
        self._is_over.wait(timeout_s)

    def _count(self, _: object) -> None:
        with self._lock:
            self._left -= 1
            if self._left == 0:
                self._is_over.set()


def _sleep_until(moment_s: float) -> None:
    left = moment_s - time.perf_counter()
    if left > 0:
        time.sleep(left)
