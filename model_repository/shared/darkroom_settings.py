"""How PyTorch is to run networks: what the `parameters` of a config.pbtxt say of it.

The engine reads them for the networks that run in its process, and the runner of one network for a
network that is a model of its own. An export copies this file beside each model.py.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

# Read when PyTorch is imported, which is later: its threads sleep where they wait for each other.
# Those that spin take the cores from other networks, and from those that they wait for.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

MAX_BUCKET = 1024
_DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")


@dataclass(frozen=True)
class TorchSettings:
    """A bad value is a ValueError with the key, the value and what is allowed."""

    device: str = "auto"
    """`cpu`, `cuda`, `cuda:N`, or `auto`: a GPU where there is one."""
    compile: int = 0
    """1 has torch.compile make kernels for the network, which takes minutes at its first calls."""
    cuda_graphs: int = 1
    """1 records a call's kernels once for each size, and launches them all together afterwards. It
    has no meaning on the CPU."""
    row_buckets: tuple[int, ...] = (1, 2, 4, 6, 8, 12, 16, 24, 32)
    """The numbers of rows that CUDA graphs are recorded for. A call of R rows runs in the smallest
    that holds it, and one of more rows than any of them at its own size."""

    def __post_init__(self) -> None:
        if not _DEVICE.fullmatch(self.device):
            raise ValueError(f"device: {self.device!r} is none of auto, cpu, cuda, cuda:N")
        for key in ("compile", "cuda_graphs"):
            if getattr(self, key) not in (0, 1):
                raise ValueError(f"{key}: {getattr(self, key)} is outside 0 to 1")
        buckets = self.row_buckets
        is_rising = all(low < high for low, high in pairwise(buckets))
        if not (buckets and is_rising and buckets[0] >= 1 and buckets[-1] <= MAX_BUCKET):
            raise ValueError(
                f"row_buckets: {','.join(map(str, buckets))!r} is not rising, or outside 1 to "
                f"{MAX_BUCKET}"
            )

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, str]) -> TorchSettings:
        """Read those of them that are settings of PyTorch's, which all may be left out."""
        names = [field.name for field in fields(cls)]
        return cls(**{name: read(name, parameters[name]) for name in names if name in parameters})


def read(key: str, text: str) -> Any:
    """The value of a setting as a config.pbtxt has it.

    Raises:
        ValueError: it is no number, or no list of numbers, where it has to be.
    """
    if key == "device":
        return text
    try:
        if key == "row_buckets":
            return tuple(int(number) for number in text.split(","))
        return int(text)
    except ValueError:
        allowed = "whole numbers, with commas between" if key == "row_buckets" else "a whole number"
        raise ValueError(f"{key}: {text!r} is not {allowed}") from None
