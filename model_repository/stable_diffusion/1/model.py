"""Triton's face of the engine: parse, submit, reply. Nothing here knows about diffusion."""

# The stub adds to pb_utils after this file is imported, so that annotations must wait.
from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils

import darkroom_stub as stub
from darkroom_engine import (
    Door,
    Engine,
    EngineConfig,
    EngineError,
    Fleet,
    InvalidRequest,
    JobResult,
    Manifest,
    MemoryProfile,
    MetricsSender,
    Networks,
    Notice,
    Residence,
    TransientNetworks,
    TritonModelControl,
    TritonNetworks,
    log_to_stderr,
)
from darkroom_engine.metrics import Record

HTTP_URL = "DARKROOM_HTTP_URL"
"""The environment variable that says where this server's HTTP face is."""
DEFAULT_HTTP_URL = "http://127.0.0.1:8000"


class TritonPythonModel:
    """One request in, one answer out, later: `execute` never waits for a picture."""

    def initialize(self, args: dict[str, str]) -> None:
        model = args["model_name"]
        log_to_stderr(model)
        config = json.loads(args["model_config"])
        self._shapes = stub.input_shapes(config)
        parameters = config["parameters"]
        # Of a server with several models: what it calls the networks, and where the manifest is.
        prefix = _pop(parameters, "network_prefix", "")
        beside = Path(args["model_repository"]).parent / "manifest.json"
        manifest = Manifest.load(Path(_pop(parameters, "manifest", str(beside))))
        engine_config = EngineConfig.from_parameters(parameters)
        self._metrics = MetricsSender(model)
        self._notice = Notice(model)
        self._transient = None
        manners = {}
        profile = MemoryProfile(engine_config.memory_profile)
        if profile is not MemoryProfile.FULL:
            control = TritonModelControl(os.environ.get(HTTP_URL, DEFAULT_HTTP_URL), prefix)
            networks = self._transient = TransientNetworks(
                _networks(manifest, engine_config, model, prefix),
                control,
                Residence.of(profile, manifest),
            )
            manners = {"is_change_due": networks.is_change_due, "rest": networks.rest}

        def make_engine(number: int, record: Record, **told: Callable[[], None]) -> Engine:
            # Networks that come and go are one engine's.
            networks = self._transient or _networks(manifest, engine_config, model, prefix, number)
            return Engine(manifest, networks, engine_config, record, **told, **manners)

        self._engine = Fleet(
            make_engine, engine_config.num_engines, self._metrics.record, on_warm=self._describe
        )
        self._door = Door(self._engine, model)
        self._is_finalized = stub.end_with_server()
        self._metrics.start()
        self._engine.start()
        self._door.start()

    def execute(self, requests: list) -> None:
        for request in requests:
            self._ask(request, Responder(request))

    def finalize(self) -> None:
        self._engine.close()
        if self._transient:
            self._transient.close()
        self._notice.remove()
        self._door.close()
        self._metrics.close()
        self._is_finalized.set()

    def _describe(self) -> None:
        self._notice.post(self._engine.describe())

    def _ask(self, request: pb_utils.InferenceRequest, responder: Responder) -> None:
        try:
            request_id = stub.read_request_id(request)
            fields = stub.read_fields(pb_utils, request, self._shapes)
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


def _networks(
    manifest: Manifest, config: EngineConfig, model: str, prefix: str, number: int = 0
) -> Networks:
    """Those of engine `number` of this model: in this process, or Triton's models."""
    if not config.is_in_process(network.backend for network in manifest.networks.values()):
        return TritonNetworks(pb_utils, model, prefix)
    # With it comes PyTorch, which other repositories do not need.
    from darkroom_engine.torch_networks import TorchNetworks  # noqa: PLC0415

    return TorchNetworks.on(manifest, config.torch, number)


def _pop(parameters: dict[str, dict[str, str]], key: str, default: str) -> str:
    return parameters.pop(key, {"string_value": default})["string_value"]


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
