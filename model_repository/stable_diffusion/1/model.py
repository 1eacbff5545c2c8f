"""Triton's face of the engine: parse, submit, reply. Nothing here knows about diffusion."""

# The stub adds to pb_utils after this file is imported, so that annotations must wait.
from __future__ import annotations

import json
import logging
import os
import threading
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils

from darkroom_engine import (
    Engine,
    EngineConfig,
    EngineError,
    ImageRequest,
    InvalidRequest,
    Job,
    JobResult,
    Manifest,
    TritonNetworks,
)

CANCEL_POLL_S = 0.02
PARENT_POLL_S = 1.0

logger = logging.getLogger(__name__)


class TritonPythonModel:
    """One request in, one answer out, later: `execute` never waits for a picture."""

    def initialize(self, args: dict[str, str]) -> None:
        logging.basicConfig(level=logging.INFO, format="darkroom %(levelname)s %(message)s")
        config = json.loads(args["model_config"])
        self._input_names = [entry["name"] for entry in config["input"]]
        manifest = Manifest.load(Path(args["model_repository"]).parent / "manifest.json")
        engine_config = EngineConfig.from_parameters(config["parameters"])
        networks = TritonNetworks(pb_utils, args["model_name"], manifest)
        self._engine = Engine(manifest, networks, engine_config)
        self._watcher = CancelWatcher()
        self._is_finalized = threading.Event()
        threading.Thread(
            target=_exit_with_parent, args=[os.getppid(), self._is_finalized], daemon=True
        ).start()
        self._engine.start()
        self._watcher.start()

    def execute(self, requests: list) -> None:
        for request in requests:
            self._submit(request, Responder(request))

    def finalize(self) -> None:
        self._watcher.close()
        self._engine.close()
        self._is_finalized.set()

    def _submit(self, request: pb_utils.InferenceRequest, responder: Responder) -> None:
        try:
            parsed = ImageRequest.parse(self._fields(request), self._engine.limits)
            job = self._engine.submit(parsed, responder)
        except EngineError as error:
            responder(error)
        except Exception as error:
            logger.exception("this is a bug")
            responder(EngineError(f"this is a bug: {error!r}"))
        else:
            self._watcher.watch(job, responder)

    def _fields(self, request: pb_utils.InferenceRequest) -> dict[str, bytes | int | float]:
        fields = {}
        for name in self._input_names:
            tensor = pb_utils.get_input_tensor_by_name(request, name)
            if tensor is None:
                continue
            values = tensor.as_numpy()
            if values.size != 1:
                raise InvalidRequest(name, f"shape {list(values.shape)} is not [1]")
            fields[name] = values.item()
        return fields


class Responder:
    """Sends the one answer of one request; called by whichever thread has it."""

    def __init__(self, request: pb_utils.InferenceRequest) -> None:
        self._sender = request.get_response_sender()
        self._lock = threading.Lock()
        self._is_answered = False

    @property
    def is_cancelled(self) -> bool:
        with self._lock:
            # Triton frees the request with its answer, and to ask afterwards crashes the server.
            return not self._is_answered and self._sender.is_cancelled()

    def __call__(self, answer: JobResult | EngineError) -> None:
        response = _error(answer) if isinstance(answer, EngineError) else _success(answer)
        with self._lock:
            self._is_answered = True
            self._sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)


class CancelWatcher:
    """Cancels the jobs whose client has left, asking on a thread of its own.

    Each question is a round trip to the server process; asked between steps, by the engine thread,
    the questions of a full batch would cost more than the rest of the turn.
    """

    def __init__(self) -> None:
        self._watched: list[tuple[Job, Responder]] = []
        self._changed = threading.Condition()
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="cancel-watcher", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def watch(self, job: Job, responder: Responder) -> None:
        with self._changed:
            self._watched.append((job, responder))
            self._changed.notify()

    def close(self) -> None:
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._watched or self._is_closing)
                if self._is_closing:
                    return
                self._watched = [entry for entry in self._watched if not entry[0].is_over]
                watched = list(self._watched)
            for job, responder in watched:
                if responder.is_cancelled:
                    job.cancel()
            with self._changed:
                self._changed.wait_for(lambda: self._is_closing, timeout=CANCEL_POLL_S)


def _exit_with_parent(parent: int, is_finalized: threading.Event) -> None:
    """End this process when the server's is gone.

    The stub looks for that itself, but then waits for a lock that a call to the dead server holds.
    """
    while not is_finalized.wait(PARENT_POLL_S):
        if os.getppid() != parent:
            os._exit(1)


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
