"""Checkpoint to verified networks in a Triton model repository.

`export_checkpoint` is the whole way; the modules are its stations: `checkpoint` loads and pins the
weights, `families` says what its networks have in common with others', `networks` what each takes
and gives, `to_onnx` exports it, `verify` compares it with PyTorch, and `loop` all of them with the
diffusers pipeline; `manifest` tells the engine, and `repository` writes what Triton loads.
"""

from darkroom_export.errors import ExportError
from darkroom_export.export import export_checkpoint
from darkroom_export.lora import add_adapters
from darkroom_export.precision import Precision

__all__ = ["ExportError", "Precision", "add_adapters", "export_checkpoint"]
