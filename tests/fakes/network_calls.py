"""A small network as Triton calls it: out_sample = sample * timestep, noise = -sample."""

from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from tritonclient.grpc import model_config_pb2

SAMPLE = np.array([[1, 2, 3], [4, 5, 6]], np.float32)
TIMESTEP = np.array([[10], [100]], np.float32)
"""As Triton sends it: with a dimension beside the batch, of which the network knows nothing."""


def config(**inputs: list[int]) -> Any:
    made = model_config_pb2.ModelConfig(name="unet", backend="python", max_batch_size=63)
    for name, dims in inputs.items():
        entry = made.input.add(name=name, data_type=model_config_pb2.TYPE_FP32, dims=dims)
        if name == "timestep":
            entry.reshape.SetInParent()
    for name in ("out_sample", "noise"):
        made.output.add(name=name, data_type=model_config_pb2.TYPE_FP32, dims=[3])
    made.parameters["intra_op_thread_count"].string_value = "1"
    made.parameters["device"].string_value = "cpu"
    return made


def request(*wanted: str, **arrays: np.ndarray) -> pb_utils.InferenceRequest:
    return pb_utils.InferenceRequest(
        requested_output_names=wanted,
        inputs=[pb_utils.Tensor(name, array) for name, array in arrays.items()],
    )
