"""The precision that a network computes in; its inputs and outputs are float32 in any case."""

from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum

import torch
from torch import nn

from darkroom_export.memory import give_back


class Precision(StrEnum):
    FP32 = "fp32"
    FP16 = "fp16"

    @property
    def dtype(self) -> torch.dtype:
        return {Precision.FP32: torch.float32, Precision.FP16: torch.float16}[self]


@contextmanager
def in_float32(*modules: nn.Module) -> Iterator[None]:
    """Weights are float32 inside, and what they were outside: small, and not less exact."""
    tensors = [
        (tensor, tensor.dtype)
        for module in modules
        for tensor in (*module.parameters(), *module.buffers())
        if tensor.is_floating_point()
    ]
    for tensor, _ in tensors:
        tensor.data = tensor.data.float()
    try:
        yield
    finally:
        for tensor, dtype in tensors:
            tensor.data = tensor.data.to(dtype)
        give_back()
