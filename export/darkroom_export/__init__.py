"""Checkpoint to verified networks in a Triton model repository.

`export_checkpoint` is the whole way; the modules are its stations: `checkpoint` loads and pins the
weights, `networks` says what each network takes and gives, `to_onnx` exports it, `verify` compares
it with PyTorch, `repository` writes what Triton loads.
"""

from darkroom_export.errors import ExportError
from darkroom_export.export import export_checkpoint
from darkroom_export.precision import Precision

__all__ = ["ExportError", "Precision", "export_checkpoint"]
