"""Where PyTorch computes references, and runs the programs that are compared with them."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from darkroom_export.errors import ExportError

CPU = torch.device("cpu")
_NAMES = ("cpu", "cuda")


def find_device(name: str) -> torch.device:
    """The device that is called so.

    Raises:
        ExportError: it is none, or is not there.
    """
    if name not in _NAMES:
        raise ExportError(f"device: {name!r} is none, allowed are {', '.join(_NAMES)}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ExportError("device: 'cuda' is asked for, but PyTorch sees no GPU here; 'cpu' works")
    return torch.device(name)


@contextmanager
def in_full_float32() -> Iterator[None]:
    """Convolutions in float32 on a GPU keep all their digits, which PyTorch else cuts to TF32."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield
