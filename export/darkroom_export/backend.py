"""What runs a network."""

from enum import StrEnum


class Backend(StrEnum):
    PYTHON = "python"
    """ONNX Runtime, in a Triton Python model of ours."""
    ONNXRUNTIME = "onnxruntime"
    """Triton's own, over the same file."""
    TENSORRT = "tensorrt"
    """Triton's own, over an engine that was built of that file."""
    TORCH = "torch"
    """PyTorch, over a program of torch.export: in the engine's process, or in a Python model."""
