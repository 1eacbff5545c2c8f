"""Runs the PyTorch network that lies beside this file."""

# The stub adds to pb_utils after this file is imported, so that annotations must wait.
from __future__ import annotations

import gc

import triton_python_backend_utils as pb_utils

from darkroom_inputs import NetworkConfig
from darkroom_settings import TorchSettings
from darkroom_torch import PROGRAM, TorchNetwork, pick_device


class TritonPythonModel:
    """Any network whose inputs and outputs are named in its config.pbtxt as in its program.

    The config's parameters say how it is run, see `TorchSettings`.
    """

    def initialize(self, args: dict[str, str]) -> None:
        self._config = config = NetworkConfig.from_triton(args)
        settings = TorchSettings.from_parameters(config.parameters)
        # Where Triton has an instance for each GPU, this one's.
        number = int(args.get("model_instance_device_id") or 0)
        self._network = TorchNetwork.open(
            config.folder / PROGRAM,
            pick_device(settings.device, number),
            settings,
            fillers=config.fillers,
            lora_names=config.lora_names,
        )

    def execute(self, requests: list) -> list:
        return [self._run(request) for request in requests]

    def finalize(self) -> None:
        # Else Python looks through all that PyTorch consists of before it ends, for seconds.
        gc.freeze()

    def _run(self, request: pb_utils.InferenceRequest) -> pb_utils.InferenceResponse:
        wanted = self._config.wanted(request)
        try:
            arrays = self._network.run(self._config.read(pb_utils, request), wanted)
        except Exception as error:  # noqa: BLE001  whatever it is, it is the answer
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error)))
        return pb_utils.InferenceResponse(
            [pb_utils.Tensor(name, array) for name, array in zip(wanted, arrays, strict=True)]
        )
