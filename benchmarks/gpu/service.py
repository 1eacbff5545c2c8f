"""Requests in, pictures out, whatever makes them: our engine, and rivals over the same engine."""

import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, Self

from benchmarks.gpu.grouping import Grouping, Waiting
from benchmarks.workload import Request
from darkroom_engine import Engine, EngineConfig, JobResult, Manifest, Networks
from darkroom_engine.metrics import (
    BATCH_ROWS,
    DECODE_SECONDS,
    STEP_SECONDS,
    Metric,
)

SAMPLER = "unipc"
OUTPUT_FORMAT = "jpeg"
"""It is encoded in a tenth of the time of PNG, which is no part of what is compared here."""
MAX_QUEUE_SIZE = 4096
START_TIMEOUT_S = 600.0
ANSWER_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Answered:
    """A picture, and when it was there on the clock of `time.perf_counter`."""

    picture: bytes
    at_s: float
    timings: Mapping[str, float]
    """queue_ms, denoise_ms, decode_ms and total_ms, as the engine measured them."""
    queue_steps: int


class Service(Protocol):
    """Something that makes pictures."""

    def submit(self, request: Request) -> "Future[Answered]":
        """Returns at once; the future's exception is an EngineError."""

    def give_up(self) -> None:
        """Cancel all that is not answered, and return when nothing runs."""


class Step(NamedTuple):
    """A step of the engine, as it recorded it."""

    ended_at: float
    num_rows: int
    seconds: float


class Recorder:
    """Takes what the engine records of its steps and decodings."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.decodings_s: list[float] = []
        self._step_s = 0.0

    def __call__(self, metric: Metric, value: float, label: str = "") -> None:  # noqa: ARG002
        # Of a step, its time is recorded first, then its rows, by one thread.
        if metric is STEP_SECONDS:
            self._step_s = value
        elif metric is BATCH_ROWS:
            self.steps.append(Step(time.perf_counter(), int(value), self._step_s))
        elif metric is DECODE_SECONDS:
            self.decodings_s.append(value)

    def clear(self) -> None:
        """Forget everything so far."""
        self.steps.clear()
        self.decodings_s.clear()


class Ours:
    """Our engine over a repository's networks, in this process."""

    def __init__(self, manifest: Manifest, networks: Networks, max_rows: int) -> None:
        """Prepare it; `start` waits until it is warm."""
        self.networks = networks
        self.recorder = Recorder()
        self.max_rows = max_rows
        config = EngineConfig(max_rows=max_rows, max_queue_size=MAX_QUEUE_SIZE)
        self.engine = Engine(manifest, networks, config, self.recorder)
        self._ids = itertools.count()
        self._lock = threading.Lock()
        self._open: dict[str, Future[Answered]] = {}

    def start(self) -> float:
        """Start the engine; returns the seconds until it was warm.

        Raises:
            EngineError: it could not start.
        """
        start = time.perf_counter()
        self.engine.start()
        self.submit(Request("a circle", 0, 2)).result(START_TIMEOUT_S)
        self.recorder.clear()
        return time.perf_counter() - start

    def close(self) -> None:
        self.engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(self, request: Request) -> "Future[Answered]":
        return self.submit_as(request, OUTPUT_FORMAT)

    def submit_as(
        self,
        request: Request,
        output_format: str,
        on_last_step: Callable[[], None] | None = None,
    ) -> "Future[Answered]":
        """A request for another format; `on_last_step` is called once, when it is denoised."""
        future: Future[Answered] = Future()
        request_id = f"bench-{next(self._ids)}"
        with self._lock:
            self._open[request_id] = future
        listener = None if on_last_step is None else _LastStep(on_last_step)

        def reply(answer: Any) -> None:
            now = time.perf_counter()
            with self._lock:
                del self._open[request_id]
            if listener:
                listener.end()
            if isinstance(answer, JobResult):
                info = answer.info
                future.set_result(
                    Answered(answer.pictures[0], now, info["timings"], info["queue_steps"])
                )
            else:
                future.set_exception(answer)

        self.engine.ask(
            fields_of(request, output_format), reply, request_id=request_id, listener=listener
        )
        return future

    def submit_together(self, requests: Sequence[Request]) -> "list[Future[Answered]]":
        """All of them in one batch from their first step on, if there are rows for all."""
        with self.at_once():
            return [self.submit(request) for request in requests]

    def at_once(self) -> Any:
        """What is submitted within begins together."""
        # The engine's thread looks for newcomers under this lock, which is reentrant.
        return self.engine._changed  # noqa: SLF001  for measurements alone

    def give_up(self) -> None:
        with self._lock:
            left = dict(self._open)
        for request_id in left:
            self.engine.cancel(request_id)
        for future in left.values():
            future.exception(ANSWER_TIMEOUT_S)


class _LastStep:
    """A listener that waits for one thing."""

    preview_interval = 0

    def __init__(self, call: Callable[[], None]) -> None:
        self._call = call
        self._lock = threading.Lock()
        self._is_called = False

    def on_event(self, event: Mapping[str, Any], preview: bytes | None) -> None:  # noqa: ARG002
        if event["type"] == "step" and event["step"] == event["num_steps"]:
            self.end()

    def end(self) -> None:
        """It is denoised, or never will be."""
        with self._lock:
            is_first, self._is_called = not self._is_called, True
        if is_first:
            self._call()


class Grouped:
    """Request-level batching, or one request at a time, over the same engine and networks.

    The next group begins when the last step of one is made, while its pictures are decoded.
    """

    def __init__(self, ours: Ours, grouping: Grouping) -> None:
        self._ours = ours
        self._grouping = grouping
        self._changed = threading.Condition()
        self._queue: list[Waiting] = []
        self._futures: dict[int, Future[Answered]] = {}
        self._num_running = 0
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="grouped", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> "Future[Answered]":
        future: Future[Answered] = Future()
        with self._changed:
            waiting = Waiting(request, time.perf_counter())
            self._futures[id(waiting)] = future
            self._queue.append(waiting)
            self._changed.notify()
        return future

    def give_up(self) -> None:
        with self._changed:
            left, self._queue = self._queue, []
        for waiting in left:
            self._futures.pop(id(waiting)).cancel()
        self._ours.give_up()

    def close(self) -> None:
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        self._thread.join()
        # What the thread began after it was given up.
        self._ours.give_up()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self) -> None:
        while group := self._next():
            with self._ours.at_once():
                for waiting in group:
                    self._begin(waiting)

    def _next(self) -> list[Waiting]:
        """Wait until a group is due and nothing runs; [] at the end."""
        with self._changed:
            while not self._is_closing:
                now = time.perf_counter()
                group = [] if self._num_running else self._grouping.next_group(self._queue, now)
                if group:
                    chosen = set(map(id, group))
                    self._queue = [it for it in self._queue if id(it) not in chosen]
                    self._num_running = len(group)
                    return group
                is_busy = bool(self._num_running)
                self._changed.wait(None if is_busy else self._grouping.wait_s(self._queue, now))
        return []

    def _begin(self, waiting: Waiting) -> None:
        future = self._futures.pop(id(waiting))
        made = self._ours.submit_as(waiting.request, OUTPUT_FORMAT, self._denoised)
        made.add_done_callback(lambda done: _hand_over(done, future))

    def _denoised(self) -> None:
        with self._changed:
            self._num_running -= 1
            self._changed.notify()


def _hand_over(done: "Future[Answered]", future: "Future[Answered]") -> None:
    error = done.exception()
    if error is None:
        future.set_result(done.result())
    else:
        future.set_exception(error)


def fields_of(request: Request, output_format: str) -> dict[str, Any]:
    """A request as it comes in at the engine's door."""
    fields: dict[str, Any] = {
        "prompt": request.prompt.encode(),
        "seed": request.seed,
        "num_inference_steps": request.num_inference_steps,
        "sampler": SAMPLER.encode(),
        "output_format": output_format.encode(),
    }
    if request.guidance_scale is not None:
        fields["guidance_scale"] = request.guidance_scale
    return fields


def keep_full(
    service: Service,
    requests: Iterator[Request],
    concurrency: int,
    seconds: float,
) -> list[Answered]:
    """Keep so many requests in flight for so long: whoever is answered asks again.

    What is in flight at the end is given up.

    Raises:
        EngineError: a request failed.
    """
    done: queue.SimpleQueue[Future[Answered]] = queue.SimpleQueue()

    def ask() -> None:
        service.submit(next(requests)).add_done_callback(done.put)

    end = time.perf_counter() + seconds
    for _ in range(concurrency):
        ask()
    answers = []
    while (left := end - time.perf_counter()) > 0:
        try:
            future = done.get(timeout=left)
        except queue.Empty:
            break
        answers.append(future.result())
        ask()
    service.give_up()
    return answers
