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

from darkroom_engine.networks import TritonNetworks


class OnnxNetworks:
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
            self._models[network] = self._load(network)
        (response,) = self._models[network].execute([request])
        return response

    def _load(self, network: str) -> Any:
        folder = self._repository / network
        path = folder / "1" / "model.py"
        spec = importlib.util.spec_from_file_location(f"{network}_model", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        config = text_format.Parse(
            (folder / "config.pbtxt").read_text(), model_config_pb2.ModelConfig()
        )
        as_json = json_format.MessageToDict(config, preserving_proto_field_name=True)
        model = module.TritonPythonModel()
        model.initialize(
            {
                "model_config": json.dumps(as_json),
                "model_repository": str(folder),
                "model_version": "1",
            }
        )
        return model


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
