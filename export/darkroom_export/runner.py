"""Runs an exported network, of whatever kind its file is."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from torch.export.passes import move_to_device_pass

from darkroom_export.device import CPU
from darkroom_export.to_program import read_tensors

Array = NDArray[np.float32]
Run = Callable[[Mapping[str, NDArray[Any]], Sequence[str]], list[Array]]
"""Inputs by name, and the names of the outputs that are wanted."""


def open_network(path: Path, device: torch.device = CPU) -> Run:
    """What runs the network in a file: ONNX Runtime on the CPU, or PyTorch on a device."""
    return _open_program(path, device) if path.suffix == ".pt2" else _open_graph(path)


def _open_graph(path: Path) -> Run:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        str(path), sess_options=options, providers=["CPUExecutionProvider"]
    )

    def run(inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> list[Array]:
        arrays: list[Array] = session.run(list(outputs), dict(inputs))
        return arrays

    return run


def _open_program(path: Path, device: torch.device) -> Run:
    tensors = read_tensors(path)
    program = torch.export.load(path)
    if device != CPU:
        program = move_to_device_pass(program, device)
    module = program.module()

    def run(inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> list[Array]:
        given = [torch.from_numpy(inputs[name]).to(device) for name in tensors["inputs"]]
        # As it will be served.
        as_served = torch.backends.cudnn.flags(enabled=True, allow_tf32=tensors["allow_tf32"])
        with torch.no_grad(), as_served:
            made = module(*given)
        made = made if isinstance(made, tuple | list) else (made,)
        by_name = dict(zip(tensors["outputs"], made, strict=True))
        return [by_name[name].cpu().numpy() for name in outputs]

    return run
