"""The networks of an exported repository in this process: the models' own code, without Triton."""

import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from google.protobuf import json_format, text_format
from tritonclient.grpc import model_config_pb2

from darkroom_engine.networks import HostNetworks, TritonNetworks


class OnnxNetworks(HostNetworks):
    """The `Networks` interface over a repository's models, each loaded when it is first asked."""

    def __init__(self, repository: Path) -> None:
        self._repository = repository
        self._models: dict[str, Any] = {}
        self._by_bls = TritonNetworks(_Caller(self), "stable_diffusion")

    def wait_until_ready(
        self, networks: Sequence[str], timeout_s: float, is_given_up: Callable[[], bool]
    ) -> None:
        pass

    def run(
        self, network: str, inputs: Mapping[str, np.ndarray], outputs: Sequence[str]
    ) -> list[np.ndarray]:
        return self._by_bls.run(network, inputs, outputs)

    def execute(self, network: str, request: Any) -> Any:
        if network not in self._models:
            folder = self._repository / network
            self._models[network] = start_network(folder, folder / "1" / "model.py")
        (response,) = self._models[network].execute([request])
        return response


class _Caller:
    """What of `pb_utils` a model that calls others needs, with these networks behind it."""

    Tensor = pb_utils.Tensor
    TritonModelException = pb_utils.TritonModelException

    def __init__(self, networks: OnnxNetworks) -> None:
        self._networks = networks

    def InferenceRequest(self, model_name: str, **parts: Any) -> Any:  # noqa: N802  Triton's name
        request = pb_utils.InferenceRequest(model_name=model_name, **parts)
        request.exec = lambda: self._networks.execute(model_name, request)
        return request


def start_network(folder: Path, file: Path) -> Any:
    """What Triton runs over a network's folder: the Python model in `file`, initialized."""
    spec = importlib.util.spec_from_file_location("onnx_network_model", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = text_format.Parse(
        (folder / "config.pbtxt").read_text(), model_config_pb2.ModelConfig()
    )
    described = json_format.MessageToDict(config, preserving_proto_field_name=True)
    model = module.TritonPythonModel()
    model.initialize(
        {
            "model_config": json.dumps(described),
            "model_repository": str(folder),
            "model_version": "1",
        }
    )
    return model
