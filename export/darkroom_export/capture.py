"""What PyTorch's exporters are given of a network: a module, an example, and its dynamic axes."""

from typing import Any

import torch
from torch import nn
from torch.export import Dim

from darkroom_export.lora_inputs import WeightSpec
from darkroom_export.networks import MAX_BATCH_SIZE, InputShape, NetworkSpec, TensorSpec


class Positional(nn.Module):
    """Names no inputs of its own: those of the spec hold, however many there are."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.module(*inputs)


def example_inputs(spec: NetworkSpec) -> tuple[torch.Tensor, ...]:
    """Inputs to trace with: no two sizes are equal, so that none is taken for another."""
    return spec.example(torch.Generator().manual_seed(0), InputShape(2, 16, 24, sequence=154))


def dynamic_shapes(spec: NetworkSpec) -> tuple[dict[int, Any], ...]:
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
