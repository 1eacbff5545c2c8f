"""Checkpoint to verified networks in a Triton model repository.

`export_checkpoint` is the whole way; the modules are its stations: `checkpoint` loads and pins the
weights, `families` says what its networks have in common with others', `networks` what each takes
and gives, `configs` what Triton is told of that, `to_onnx` or `to_program` exports it, `verify`
compares it with PyTorch, and `loop` all of them with the diffusers pipeline; `manifest` tells the
engine, and `repository` writes what Triton loads. `build` gives an export to another backend, with
engines by `tensorrt` for sizes by `profiles`.
"""

import os

# From 1.29 on, ONNX Runtime tells its maker of every session, unless this is set when it is loaded.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

from darkroom_export.backend import Backend
from darkroom_export.errors import ExportError
from darkroom_export.export import export_checkpoint
from darkroom_export.lora import add_adapters
from darkroom_export.precision import Precision

__all__ = ["Backend", "ExportError", "Precision", "add_adapters", "export_checkpoint"]
