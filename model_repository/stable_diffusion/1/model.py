"""Triton's face of the engine: parse, submit, reply. Nothing here knows about diffusion."""

# The stub adds to pb_utils after this file is imported, so that annotations must wait.
from __future__ import annotations

import fcntl
import json
import logging
import queue
import threading
from pathlib import Path
from typing import IO

import numpy as np
import triton_python_backend_utils as pb_utils

import darkroom_stub as stub
import darkroom_wire as wire
from darkroom_engine import (
    Door,
    Engine,
    EngineConfig,
    EngineError,
    InvalidRequest,
    JobResult,
    Manifest,
    Metric,
    TritonNetworks,
    log_to_stderr,
)

LOCK_POLL_S = 0.1

logger = logging.getLogger(__name__)


class TritonPythonModel:
    """One request in, one answer out, later: `execute` never waits for a picture."""

    def initialize(self, args: dict[str, str]) -> None:
        log_to_stderr()
        config = json.loads(args["model_config"])
        self._input_names = [entry["name"] for entry in config["input"]]
        manifest = Manifest.load(Path(args["model_repository"]).parent / "manifest.json")
        engine_config = EngineConfig.from_parameters(config["parameters"])
        networks = TritonNetworks(pb_utils, args["model_name"], manifest)
        self._metrics = MetricsPublisher()
        self._engine = Engine(manifest, networks, engine_config, self._metrics.record)
        self._door = Door(self._engine)
        self._is_finalized = stub.end_with_server()
        self._metrics.start()
        self._engine.start()
        self._door.start()

    def execute(self, requests: list) -> None:
        for request in requests:
            self._ask(request, Responder(request))

    def finalize(self) -> None:
        self._engine.close()
        self._door.close()
        self._metrics.close()
        self._is_finalized.set()

    def _ask(self, request: pb_utils.InferenceRequest, responder: Responder) -> None:
        try:
            request_id = stub.read_request_id(request)
            fields = stub.read_fields(pb_utils, request, self._input_names)
        except stub.MalformedField as error:
            self._engine.refuse(InvalidRequest(error.field, str(error)), responder)
            return
        self._engine.ask(
            fields,
            responder,
            request_id=request_id,
            is_abandoned=responder.is_cancelled,
        )


class Responder:
    """Sends the one answer of one request; called by whichever thread has it."""

    def __init__(self, request: pb_utils.InferenceRequest) -> None:
        self._sender = request.get_response_sender()
        self._lock = threading.Lock()
        self._is_answered = False

    def is_cancelled(self) -> bool:
        with self._lock:
            # Triton frees the request with its answer, and to ask afterwards crashes the server.
            return not self._is_answered and self._sender.is_cancelled()

    def __call__(self, answer: JobResult | EngineError) -> None:
        response = _error(answer) if isinstance(answer, EngineError) else _success(answer)
        with self._lock:
            self._is_answered = True
            self._sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)


class MetricsPublisher:
    """Hands the engine's metrics to Triton, on a thread of its own: each call is a round trip.

    When Triton reloads a model, the new instance may be there before the old one has gone. Both
    have the same metrics, and the old one's end would take them from the new one and the server's
    life with them. So the new one keeps what it has to tell until the old one is through.
    """

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[tuple[Metric, float, str] | None] = queue.SimpleQueue()
        self._families: dict[str, pb_utils.MetricFamily] = {}
        self._series: dict[tuple[str, str], pb_utils.Metric] = {}
        self._gauges: dict[str, float] = {}
        self._is_closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Publish what is left, and take the metrics away."""
        self._is_closing.set()
        self._queue.put(None)
        self._thread.join()

    def record(self, metric: Metric, value: float, label: str = "") -> None:
        if metric.kind == "GAUGE":
            if self._gauges.get(metric.name) == value:
                return
            self._gauges[metric.name] = value
        self._queue.put((metric, value, label))

    def _run(self) -> None:
        with (wire.runtime_dir() / "metrics.lock").open("w") as lock:
            while not _is_locked(lock):
                if self._is_closing.wait(LOCK_POLL_S):
                    return
            self._publish_all()
            if stub.is_server_gone():
                return
            # Triton wants the series gone before their families, and both before the next ones.
            self._series.clear()
            self._families.clear()

    def _publish_all(self) -> None:
        while (entry := self._queue.get()) is not None:
            # Such a call would hang with Python's lock held, and nobody could end this process.
            if stub.is_server_gone():
                return
            try:
                self._publish(*entry)
            except Exception:
                logger.exception("a metric could not be published")

    def _publish(self, metric: Metric, value: float, label: str) -> None:
        series = self._series.get((metric.name, label))
        if series is None:
            series = self._series[metric.name, label] = self._make_series(metric, label)
        if metric.kind == "COUNTER":
            series.increment(value)
        elif metric.kind == "GAUGE":
            series.set(value)
        else:
            series.observe(value)

    def _make_series(self, metric: Metric, label: str) -> pb_utils.Metric:
        if metric.name not in self._families:
            self._families[metric.name] = pb_utils.MetricFamily(
                name=metric.name,
                description=metric.description,
                kind=getattr(pb_utils.MetricFamily, metric.kind),
            )
        labels = {metric.label: label} if metric.label else {}
        options = {"buckets": list(metric.buckets)} if metric.buckets else {}
        return self._families[metric.name].Metric(labels=labels, **options)


def _is_locked(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _success(result: JobResult) -> pb_utils.InferenceResponse:
    return pb_utils.InferenceResponse(
        [
            pb_utils.Tensor("image", np.array(result.pictures, dtype=object)),
            pb_utils.Tensor("seed", np.array(result.seeds, dtype=np.int64)),
            pb_utils.Tensor("info", np.array([json.dumps(result.info)], dtype=object)),
        ]
    )


def _error(error: EngineError) -> pb_utils.InferenceResponse:
    code = getattr(pb_utils.TritonError, error.code)
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error), code))
