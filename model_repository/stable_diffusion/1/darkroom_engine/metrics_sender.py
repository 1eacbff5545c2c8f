"""Tells an engine's metrics to the model that publishes them for the whole server."""

import threading
from dataclasses import asdict
from multiprocessing.connection import Connection

import darkroom_wire as wire
from darkroom_engine.metrics import DROPPED_RECORDS, METRICS, Kind, Metric

MAX_RECORDS = 10_000
"""That may wait to be told."""
LINGER_S = 0.05
"""What comes within this time is told together."""
RETRY_S = 0.2
CLOSE_TIMEOUT_S = 2.0

Record = tuple[str, float, str]
"""The metric's name, the value, and the label's value."""


class MetricsSender:
    """Takes records and sends them on, on a thread of its own.

    Whoever records never waits. What comes while nobody listens is kept for the next who does, as
    far as there is room for it; the rest is dropped, and counted.
    """

    def __init__(self, model: str) -> None:
        self._model = model
        self._changed = threading.Condition()
        self._records: list[Record] = []
        self._gauges: dict[str, float] = {}
        self._changed_gauges: set[str] = set()
        self._num_dropped = 0
        self._is_closing = threading.Event()
        self._connection: Connection | None = None
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Tell what is left, if somebody takes it."""
        self._is_closing.set()
        with self._changed:
            self._changed.notify()
        self._thread.join(CLOSE_TIMEOUT_S)

    def record(self, metric: Metric, value: float, label: str = "") -> None:
        with self._changed:
            if metric.kind is Kind.GAUGE:
                if self._gauges.get(metric.name) == value:
                    return
                self._gauges[metric.name] = value
                self._changed_gauges.add(metric.name)
            elif len(self._records) < MAX_RECORDS:
                self._records.append((metric.name, value, label))
            else:
                self._num_dropped += 1
            self._changed.notify()

    def _run(self) -> None:
        is_last = False
        while not is_last:
            self._tell()
            with self._changed:
                self._changed.wait_for(lambda: self._has_news or self._is_closing.is_set())
            is_last = self._is_closing.wait(LINGER_S if self._connection else RETRY_S)
        self._tell()
        if self._connection:
            self._connection.close()

    @property
    def _has_news(self) -> bool:
        return bool(self._records or self._changed_gauges or self._num_dropped)

    def _tell(self) -> None:
        try:
            connection = self._connection or self._introduce()
        except OSError:
            return
        self._connection = connection
        records = self._take()
        if not records:
            return
        try:
            wire.send(connection, {"records": records})
        except OSError:
            self._lose(connection, records)

    def _introduce(self) -> Connection:
        """Connect to whoever listens now, who may know nothing yet."""
        connection = wire.connect(wire.metrics_path())
        metrics = [asdict(metric) for metric in METRICS]
        try:
            wire.send(connection, {"model": self._model, "metrics": metrics})
        except OSError:
            connection.close()
            raise
        with self._changed:
            self._changed_gauges.update(self._gauges)
        return connection

    def _take(self) -> list[Record]:
        """All that is to be told."""
        with self._changed:
            records = self._records
            records += [(name, self._gauges[name], "") for name in sorted(self._changed_gauges)]
            if self._num_dropped:
                records.append((DROPPED_RECORDS.name, self._num_dropped, ""))
            self._records = []
            self._changed_gauges.clear()
            self._num_dropped = 0
            return records

    def _lose(self, connection: Connection, records: list[Record]) -> None:
        """Count what was told to somebody who has gone; the gauges will be told again."""
        connection.close()
        self._connection = None
        dropped = [record for record in records if record[0] not in self._gauges]
        with self._changed:
            self._num_dropped += sum(
                int(value) if name == DROPPED_RECORDS.name else 1 for name, value, _ in dropped
            )
