"""What a run of denoising ends with, before it is decoded."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

NPY_MAGIC = b"\x93NUMPY"
"""What the bytes of latents begin with, and those of no picture."""


# Two arrays cannot be compared to one truth value.
@dataclass(frozen=True, eq=False)
class Latents:
    """Latents that another call can go on from, as its `image`."""

    array: NDArray[np.float32] = field(repr=False)
    """(C, height / 8, width / 8), at the scale of the denoising loop."""
    seed: int
    """Generating with this seed makes these latents again."""
    info: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """What the server tells of the request: timings, notes, the model and its hash."""

    @classmethod
    def from_bytes(cls, encoded: bytes, seed: int, info: Mapping[str, Any] | None = None) -> Self:
        """Read what `to_bytes` writes; a ValueError if it is anything else."""
        if not encoded.startswith(NPY_MAGIC):
            raise ValueError(f"{len(encoded)} bytes that are no latents")
        array = np.load(BytesIO(encoded), allow_pickle=False)
        if array.dtype != np.float32 or array.ndim != 3:
            raise ValueError(f"latents of {array.dtype} and shape {array.shape}")
        return cls(array, seed, info or {})

    def to_bytes(self) -> bytes:
        """The file that `numpy.load` reads, and that the server takes."""
        buffer = BytesIO()
        np.save(buffer, np.ascontiguousarray(self.array, np.float32), allow_pickle=False)
        return buffer.getvalue()
