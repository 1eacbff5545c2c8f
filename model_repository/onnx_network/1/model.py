"""Runs the ONNX network that lies beside this file, on ONNX Runtime."""

# The stub adds to pb_utils after this file is imported, so that annotations must wait.
from __future__ import annotations

import json
from pathlib import Path

import onnxruntime
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """Any network whose inputs and outputs are named in its config.pbtxt as in its graph."""

    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        self._inputs = config["input"]
        self._outputs = [entry["name"] for entry in config["output"]]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = int(
            config["parameters"]["intra_op_thread_count"]["string_value"]
        )
        # The networks take turns: threads that spin while idle would take the cores from whichever
        # network is running.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        path = Path(args["model_repository"]) / args["model_version"] / "model.onnx"
        self._session = onnxruntime.InferenceSession(
            str(path), sess_options=options, providers=["CPUExecutionProvider"]
        )

    def execute(self, requests: list) -> list:
        return [self._run(request) for request in requests]

    def _run(self, request: pb_utils.InferenceRequest) -> pb_utils.InferenceResponse:
        # Triton lists all of them for a request that lists none.
        wanted = request.requested_output_names() or self._outputs
        try:
            feed = {entry["name"]: self._read(request, entry) for entry in self._inputs}
            arrays = self._session.run(wanted, feed)
        except Exception as error:  # noqa: BLE001  whatever it is, it is the answer
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error)))
        return pb_utils.InferenceResponse(
            [pb_utils.Tensor(name, array) for name, array in zip(wanted, arrays, strict=True)]
        )

    @staticmethod
    def _read(request: pb_utils.InferenceRequest, entry: dict) -> object:
        array = pb_utils.get_input_tensor_by_name(request, entry["name"]).as_numpy()
        # `reshape { }` in the config: the graph sees the batch dimension alone.
        return array.reshape(-1) if "reshape" in entry else array
