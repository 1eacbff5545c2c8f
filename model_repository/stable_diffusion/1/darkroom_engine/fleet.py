"""Several engines that answer as one: a running batch on each GPU."""

import logging
import threading
from collections.abc import Callable
from enum import IntEnum
from functools import partial
from typing import Any, Protocol

from darkroom_engine.engine import Engine
from darkroom_engine.errors import EngineError, InvalidRequest, Overloaded
from darkroom_engine.intake import Intake, never
from darkroom_engine.job import Job, Listener, Reply
from darkroom_engine.metrics import Kind, Metric, Record, record_nothing
from darkroom_engine.request import ImageRequest
from darkroom_engine.watcher import IsAbandoned

logger = logging.getLogger(__name__)


class MakeEngine(Protocol):
    """Makes engine `number` of a fleet, from 0, which is to record and to report as it is told."""

    def __call__(
        self,
        number: int,
        record: Record,
        *,
        on_warm: Callable[[], None],
        on_failed: Callable[[], None],
    ) -> Engine: ...


class _State(IntEnum):
    """How far an engine has come; requests go to those of the lowest number."""

    WARM = 0
    STARTING = 1
    FAILED = 2


def _do_nothing() -> None:
    pass


class Fleet(Intake):
    """Engines of one checkpoint, each with a batch and networks of its own.

    It has an engine's face. A request, with all its pictures, goes to the engine that has the least
    left to do, and stays there: a batch is on one GPU. Limits and positions in the queue are those
    of each engine.
    """

    def __init__(
        self,
        make_engine: MakeEngine,
        num_engines: int,
        record: Record = record_nothing,
        *,
        on_warm: Callable[[], None] = _do_nothing,
    ) -> None:
        """Make the engines.

        Args:
            record: takes what they count and measure together.
            on_warm: called on an engine's thread when each of them has begun or failed, if one has
                begun.

        Raises:
            ValueError: a setting that does not fit the checkpoint.
        """
        self._on_warm = on_warm
        self._lock = threading.Lock()
        """Requests are given out one after the other, each with what those before it come to."""
        self._changed = threading.Lock()
        self._states = [_State.STARTING] * num_engines
        gauges = _SummedGauges(record)
        self._engines = [
            make_engine(
                number,
                gauges.record_of(number),
                on_warm=partial(self._end_start, number, _State.WARM),
                on_failed=partial(self._end_start, number, _State.FAILED),
            )
            for number in range(num_engines)
        ]
        self.limits = self._engines[0].limits

    def start(self) -> None:
        """Start all engines at once; requests are taken from now on."""
        for engine in self._engines:
            engine.start()

    def close(self) -> None:
        """Answer everything that is still here with an error, and stop."""
        for engine in self._engines:
            engine.begin_close()
        for engine in self._engines:
            engine.close()

    def refuse(self, error: EngineError, reply: Reply, request_id: str = "") -> None:
        self._engines[0].refuse(error, reply, request_id)

    def submit(
        self,
        request: ImageRequest,
        reply: Reply,
        *,
        request_id: str = "",
        is_abandoned: IsAbandoned = never,
        listener: Listener | None = None,
    ) -> Job:
        """As `Intake.submit`, where it is done soonest.

        All engines are asked before it is refused, for the shortest time that one of them told.
        """
        refusals: list[EngineError] = []
        with self._lock:
            for engine in self._by_work():
                try:
                    return engine.submit(
                        request,
                        reply,
                        request_id=request_id,
                        is_abandoned=is_abandoned,
                        listener=listener,
                    )
                except InvalidRequest:
                    raise
                except EngineError as error:
                    refusals.append(error)
        overloaded = [error for error in refusals if isinstance(error, Overloaded)]
        raise min(overloaded, key=lambda error: error.retry_after_s, default=refusals[0])

    @property
    def jobs(self) -> list[Job]:
        return [job for engine in self._engines for job in engine.jobs]

    def describe(self) -> dict[str, Any]:
        """What all of them serve, see `offer`."""
        return self._engines[0].describe()

    def _by_work(self) -> list[Engine]:
        """The engines in the order in which they should have the next request."""
        works = [engine.work for engine in self._engines]
        # Seconds of one cannot be compared with rows of another.
        are_timed = all(work.seconds or not work.row_steps for work in works)

        def key(number: int) -> tuple[_State, float]:
            work = works[number]
            return self._states[number], work.seconds if are_timed else work.row_steps

        return [self._engines[number] for number in sorted(range(len(works)), key=key)]

    def _end_start(self, number: int, state: _State) -> None:
        with self._changed:
            self._states[number] = state
            is_ready = _State.STARTING not in self._states and _State.WARM in self._states
        if is_ready:
            self._on_warm()


class _SummedGauges:
    """Adds up the gauges of several engines; what they count adds up by itself."""

    def __init__(self, record: Record) -> None:
        self._record = record
        self._lock = threading.Lock()
        self._values: dict[str, dict[int, float]] = {}

    def record_of(self, number: int) -> Record:
        """What engine `number` is to record with."""

        def record(metric: Metric, value: float, label: str = "") -> None:
            if metric.kind is not Kind.GAUGE:
                self._record(metric, value, label)
                return
            # Whoever comes later has the later sum.
            with self._lock:
                values = self._values.setdefault(metric.name, {})
                values[number] = value
                self._record(metric, sum(values.values()), label)

        return record
