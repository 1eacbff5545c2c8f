"""The precision that a network computes in; its inputs and outputs are float32 in any case."""

from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum

import torch
from torch import nn

from darkroom_export.device import CPU
from darkroom_export.memory import give_back


class Precision(StrEnum):
    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"

    @property
    def dtype(self) -> torch.dtype:
        return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[self]


@contextmanager
def in_float32(*modules: nn.Module, device: torch.device = CPU) -> Iterator[None]:
    """Weights are float32 on the device inside, and what and where they were outside.

    Outside they are small, and not less exact; a device's memory is for one network at a time.
    """
    tensors = [
        (tensor, tensor.dtype, tensor.device)
        for module in modules
        for tensor in (*module.parameters(), *module.buffers())
    ]
    # Moved while they are small: before they become float32, and after they were.
    for tensor, _, _ in tensors:
        moved = tensor.data.to(device)
        tensor.data = moved.float() if tensor.is_floating_point() else moved
    try:
        yield
    finally:
        for tensor, dtype, home in tensors:
            tensor.data = tensor.data.to(dtype).to(home)
        give_back()
