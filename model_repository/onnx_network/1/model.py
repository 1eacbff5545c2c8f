"""Runs the ONNX network that lies beside this file, on ONNX Runtime."""

# The stub adds to pb_utils after this file is imported, so that annotations must wait.
from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

# From 1.29 on, ONNX Runtime tells its maker of every session, unless this is set when it is loaded.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils

from darkroom_inputs import LORA_SCALE, Adapters, NetworkConfig, left_out


class TritonPythonModel:
    """Any network whose inputs and outputs are named in its config.pbtxt as in its graph."""

    def initialize(self, args: dict[str, str]) -> None:
        self._config = config = NetworkConfig.from_triton(args)
        self._session = _open(config.folder / "model.onnx", config.parameters)
        shapes = {entry.name: entry.shape for entry in self._session.get_inputs()}
        self._adapters = Adapters(config.folder / "adapters", config.lora_names, shapes)

    def execute(self, requests: list) -> list:
        return [self._run(request) for request in requests]

    def _run(self, request: pb_utils.InferenceRequest) -> pb_utils.InferenceResponse:
        wanted = self._config.wanted(request)
        try:
            arrays = self._session.run(wanted, self._feed(request))
        except Exception as error:  # noqa: BLE001  whatever it is, it is the answer
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error)))
        return pb_utils.InferenceResponse(
            [pb_utils.Tensor(name, array) for name, array in zip(wanted, arrays, strict=True)]
        )

    def _feed(self, request: pb_utils.InferenceRequest) -> dict[str, np.ndarray]:
        given = self._config.read(pb_utils, request)
        scale = given.pop(LORA_SCALE, None)
        shapes = {name: array.shape for name, array in given.items()}
        zeros = {
            name: np.zeros(shape, np.float32)
            for name, shape in left_out(self._config.fillers, shapes).items()
        }
        batch = len(next(iter(given.values())))
        own, shared = self._adapters.shares(scale, batch)
        return {**given, **zeros, **own, **shared}


def _open(path: Path, parameters: Mapping[str, str]) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = int(parameters["intra_op_thread_count"])
    # The networks take turns: threads that spin while idle would take the cores from whichever
    # network is running.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    disabled = parameters.get("disabled_optimizers", "")
    return onnxruntime.InferenceSession(
        str(path),
        sess_options=options,
        providers=["CPUExecutionProvider"],
        disabled_optimizers=[name.strip() for name in disabled.split(",") if name.strip()],
    )
