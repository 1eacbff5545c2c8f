"""The server's own model: tells which models there are, and publishes the metrics of all."""

# The stub adds to pb_utils after this file is imported, so that annotations must wait.
from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import multiprocessing.connection
import socket
import threading
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any

import numpy as np
import triton_python_backend_utils as pb_utils

import darkroom_stub as stub
import darkroom_wire as wire

BACKLOG = 32
LOCK_POLL_S = 0.1
RETRY_S = 0.1
MODEL_LABEL = "model"

logger = logging.getLogger(__name__)


class TritonPythonModel:
    """The name of a model in, or none; what may be asked of it out."""

    def initialize(self, _: dict[str, str]) -> None:
        self._publisher = MetricsPublisher()
        self._is_finalized = stub.end_with_server()
        self._publisher.start()

    def execute(self, requests: list) -> list:
        return [self._describe(request) for request in requests]

    def finalize(self) -> None:
        self._publisher.close()
        self._is_finalized.set()

    def _describe(self, request: pb_utils.InferenceRequest) -> pb_utils.InferenceResponse:
        try:
            fields = stub.read_fields(pb_utils, request, {"model": [1]})
            models = _named(fields["model"]) if "model" in fields else _models()
        except stub.MalformedField as error:
            message = f"{error.field}: {error}"
            return pb_utils.InferenceResponse(
                error=pb_utils.TritonError(message, pb_utils.TritonError.INVALID_ARG)
            )
        text = json.dumps(models)
        return pb_utils.InferenceResponse(
            [pb_utils.Tensor("models", np.array([text.encode()], dtype=object))]
        )


class MetricsPublisher:
    """Takes what the engines count, and hands it to Triton, on a thread of its own.

    All metrics are made by this one process: of two that have the same, the end of one would take
    them from the other, and the server's life with them. When Triton reloads this model, the new
    instance may be there before the old one has gone, and waits for its end.
    """

    def __init__(self) -> None:
        self._families: dict[str, pb_utils.MetricFamily] = {}
        self._series: dict[tuple[str, str, str], pb_utils.Metric] = {}
        self._engines: dict[Connection, Engine] = {}
        self._is_closing = threading.Event()
        # Closed to wake the thread, which waits for connections.
        self._bell, self._doorbell = multiprocessing.connection.Pipe(duplex=False)
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)

    def start(self) -> None:
        wire.make_runtime_dir()
        self._thread.start()

    def close(self) -> None:
        """Take the metrics away."""
        self._is_closing.set()
        self._doorbell.close()
        self._thread.join()

    def _run(self) -> None:
        with (wire.runtime_dir() / "metrics.lock").open("w") as lock:
            while not _is_locked(lock):
                if self._is_closing.wait(LOCK_POLL_S):
                    return
            with _listening(wire.metrics_path()) as listener:
                self._serve(listener)
            for connection in self._engines:
                connection.close()
            if stub.is_server_gone():
                return
            # Triton wants the series gone before their families, and both before the next ones.
            self._series.clear()
            self._families.clear()

    def _serve(self, listener: socket.socket) -> None:
        while True:
            ready = multiprocessing.connection.wait([self._bell, listener, *self._engines])
            for it in ready:
                if it in self._engines:
                    self._take(it)
                elif it is listener:
                    self._welcome(listener)
            if self._is_closing.is_set() or stub.is_server_gone():
                return

    def _welcome(self, listener: socket.socket) -> None:
        try:
            accepted, _ = listener.accept()
        except OSError as error:
            # Out of file descriptors, say: the engine keeps its records until it is let in.
            logger.warning("an engine's connection failed: %s", error)
            self._is_closing.wait(RETRY_S)
            return
        self._engines[Connection(accepted.detach())] = Engine()

    def _take(self, connection: Connection) -> None:
        """Read one message of an engine, or its end."""
        engine = self._engines[connection]
        try:
            header, _ = wire.receive(connection)
            if "metrics" in header:
                engine.introduce(header)
        except Exception as error:  # noqa: BLE001  whatever it is, one engine's is not the others'
            if not isinstance(error, EOFError | OSError):
                logger.warning("an engine's metrics cannot be read: %r", error)
            del self._engines[connection]
            connection.close()
            return
        for name, value, label in header.get("records", ()):
            # Such a call would hang with Python's lock held, and nobody could end this process.
            if stub.is_server_gone():
                return
            try:
                self._publish(engine, name, value, label)
            except Exception:
                logger.exception("a metric could not be published")

    def _publish(self, engine: Engine, name: str, value: float, label: str) -> None:
        metric = engine.metrics[name]
        series = self._series.get((name, engine.model, label))
        if series is None:
            series = self._make_series(metric, {MODEL_LABEL: engine.model}, label)
            self._series[name, engine.model, label] = series
        if metric["kind"] == "COUNTER":
            series.increment(value)
        elif metric["kind"] == "GAUGE":
            series.set(value)
        else:
            series.observe(value)

    def _make_series(
        self, metric: Mapping[str, Any], labels: dict[str, str], label: str
    ) -> pb_utils.Metric:
        name = metric["name"]
        if name not in self._families:
            self._families[name] = pb_utils.MetricFamily(
                name=name,
                description=metric["description"],
                kind=getattr(pb_utils.MetricFamily, metric["kind"]),
            )
        if metric["label"]:
            labels = {**labels, metric["label"]: label}
        options = {"buckets": metric["buckets"]} if metric["buckets"] else {}
        return self._families[name].Metric(labels=labels, **options)


class Engine:
    """One engine that tells its metrics: the model's name, and its table of them."""

    def __init__(self) -> None:
        self.model = ""
        self.metrics: dict[str, Mapping[str, Any]] = {}

    def introduce(self, header: Mapping[str, Any]) -> None:
        self.model = header["model"]
        self.metrics = {metric["name"]: metric for metric in header["metrics"]}


@contextlib.contextmanager
def _listening(path: Path) -> Any:
    with socket.socket(socket.AF_UNIX) as listener:
        # One that a killed process has left there is no use to anybody.
        path.unlink(missing_ok=True)
        listener.bind(str(path))
        listener.listen(BACKLOG)
        try:
            yield listener
        finally:
            path.unlink(missing_ok=True)


def _is_locked(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _models() -> list[dict[str, Any]]:
    """What the engines that are warm say of themselves, by the names of their models."""
    models = []
    for name, path in wire.description_paths().items():
        # An engine may leave at any time.
        with contextlib.suppress(FileNotFoundError):
            models.append({"model": name, **json.loads(path.read_text())})
    return models


def _named(raw: bytes) -> list[dict[str, Any]]:
    models = _models()
    found = [model for model in models if model["model"].encode() == raw]
    if not found:
        names = ", ".join(model["model"] for model in models)
        text = raw.decode(errors="replace")
        raise stub.MalformedField("model", f"{text!r} does not exist, there are {names}")
    return found
