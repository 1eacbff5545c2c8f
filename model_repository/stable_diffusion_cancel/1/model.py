"""Cancels a request by its id, for clients whose leaving Triton does not tell: plain HTTP ones."""

# The stub adds to pb_utils after this file is imported, so that annotations must wait.
from __future__ import annotations

import json

import numpy as np
import triton_python_backend_utils as pb_utils

import darkroom_stub as stub
import darkroom_wire as wire


class TritonPythonModel:
    """The id of a request in, whether it was cancelled out."""

    def initialize(self, args: dict[str, str]) -> None:
        self._shapes = stub.input_shapes(json.loads(args["model_config"]))
        self._engine = wire.socket_path(args["model_name"].removesuffix("_cancel"))

    def execute(self, requests: list) -> list:
        return [self._cancel(request) for request in requests]

    def _cancel(self, request: pb_utils.InferenceRequest) -> pb_utils.InferenceResponse:
        try:
            request_id = _text(stub.read_fields(pb_utils, request, self._shapes)["request_id"])
            with wire.connect(self._engine) as connection:
                wire.send(connection, {"op": "cancel", "request_id": request_id})
                answer, _ = wire.receive(connection)
        except stub.MalformedField as error:
            return _error(f"{error.field}: {error}", "INVALID_ARG")
        except (EOFError, OSError) as error:
            return _error(f"the engine is not running: {error}", "UNAVAILABLE")
        if "error" in answer:
            return _error(answer["error"], answer["code"])
        return pb_utils.InferenceResponse(
            [pb_utils.Tensor("cancelled", np.array([answer["cancelled"]]))]
        )


def _text(raw: bytes) -> str:
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        text = ""
    if not text:
        raise stub.MalformedField("request_id", f"{raw!r} is not the id of a request")
    return text


def _error(message: str, code: str) -> pb_utils.InferenceResponse:
    return pb_utils.InferenceResponse(
        error=pb_utils.TritonError(message, getattr(pb_utils.TritonError, code))
    )
