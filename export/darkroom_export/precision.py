"""The precision that a network computes in; its inputs and outputs are float32 in any case."""

from enum import StrEnum

import torch


class Precision(StrEnum):
    FP32 = "fp32"
    FP16 = "fp16"

    @property
    def dtype(self) -> torch.dtype:
        return {Precision.FP32: torch.float32, Precision.FP16: torch.float16}[self]
