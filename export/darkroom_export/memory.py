"""Memory of weights that are not needed any more."""

import ctypes
import gc

from torch import nn


def free(module: nn.Module) -> None:
    """Give back the memory of the weights, whoever may still hold them: PyTorch's exporter does."""
    for tensor in (*module.parameters(), *module.buffers()):
        storage = tensor.untyped_storage()
        # Not of those that share it with others, as slices of a file.
        if storage.resizable() and storage.nbytes() == tensor.nbytes:
            storage.resize_(0)
    module.to("meta")
    give_back()


def give_back() -> None:
    """Return what is free to the system: glibc keeps it where something in use lies beyond."""
    gc.collect()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
