"""A PyTorch network to an ONNX file."""

import warnings
from pathlib import Path
from typing import Any, cast

import onnx
import torch
from torch import nn
from torch.export import Dim

from darkroom_export.errors import ExportError
from darkroom_export.lora_inputs import WeightSpec
from darkroom_export.networks import MAX_BATCH_SIZE, InputShape, NetworkSpec, TensorSpec
from darkroom_export.precision import Precision

MAX_EMBEDDED_BYTES = 1 << 30
"""Weights above this go to a file beside the graph: a protobuf file ends at 2 GiB."""


def export_onnx(spec: NetworkSpec, precision: Precision, path: Path) -> list[Path]:
    """Write `spec` as ONNX in the given precision; returns the files written, the graph first.

    The module is left converted to that precision.

    Raises:
        ExportError: PyTorch cannot export the network, or ONNX refuses the result.
    """
    spec.convert(precision)
    # No two sizes are equal, so that none is taken for another.
    example = spec.example(torch.Generator().manual_seed(0), InputShape(2, 16, 24, sequence=154))
    num_bytes = sum(tensor.nbytes for tensor in spec.module.state_dict().values())
    is_external = num_bytes > MAX_EMBEDDED_BYTES
    try:
        with torch.no_grad(), warnings.catch_warnings():
            # They speak of PyTorch's own future and of torchvision, not of this network.
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                _Positional(spec.module.eval()),
                example,
                dynamo=True,
                verbose=False,
                dynamic_shapes=(_dynamic_shapes(spec),),
                input_names=[tensor.name for tensor in spec.inputs],
                output_names=[tensor.name for tensor in spec.outputs],
            )
            cast(torch.onnx.ONNXProgram, program).save(path, external_data=is_external)
        # By path, because a graph with external weights cannot be checked in memory.
        onnx.checker.check_model(path)
    except Exception as error:  # the exporter raises many kinds
        raise ExportError(f"{spec.name}: export to ONNX failed, {error}") from error
    external = path.with_name(f"{path.name}.data")
    return [path, external] if is_external else [path]


class _Positional(nn.Module):
    """Names no inputs of its own: those of the spec hold, however many there are."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.module(*inputs)


def _dynamic_shapes(spec: NetworkSpec) -> tuple[dict[int, Any], ...]:
    """For each input, its dynamic axes; a name means the same size wherever it stands."""
    batch = Dim("batch", min=1, max=MAX_BATCH_SIZE)
    named: dict[str, Any] = {}

    def axis(size: str) -> Any:
        factor, _, name = size.rpartition("*")
        if name not in named:
            named[name] = Dim(name, min=1, max=1024)
        return int(factor) * named[name] if factor not in ("", "1") else named[name]

    def axes(tensor: TensorSpec) -> dict[int, Any]:
        is_batched = not isinstance(tensor, WeightSpec)
        sizes = enumerate(tensor.shape, start=int(is_batched))
        dynamic = {index: axis(size) for index, size in sizes if isinstance(size, str)}
        return {0: batch} | dynamic if is_batched else dynamic

    return tuple(axes(tensor) for tensor in spec.inputs)
