"""A PyTorch network to a program of torch.export, which PyTorch runs without the model's code."""

import json
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

from darkroom_export.capture import Positional, dynamic_shapes, example_inputs
from darkroom_export.errors import ExportError
from darkroom_export.lora_inputs import lora_widths
from darkroom_export.networks import NetworkSpec
from darkroom_export.precision import Precision

TENSORS = "tensors.json"
"""In the file beside the program, which itself knows neither: the names of its inputs and outputs
in their order; the layers that take LoRA adapters, each with its widths; and whether a GPU may cut
the float32 numbers of convolutions to TF32."""


def export_program(spec: NetworkSpec, precision: Precision, path: Path) -> list[Path]:
    """Write `spec` as a program in the given precision; returns the files written.

    The module is left converted to that precision. A program is of the CPU, and is moved to another
    device when it is loaded.

    Raises:
        ExportError: PyTorch cannot export the network.
    """
    spec.convert(precision)
    module = Positional(spec.module.eval())
    tensors = {
        "inputs": [tensor.name for tensor in spec.inputs],
        "outputs": [tensor.name for tensor in spec.outputs],
        "lora_widths": lora_widths(spec),
        # Of TF32's numbers, 10 bits are behind the point, as of float16's.
        "allow_tf32": precision is not Precision.FP32,
    }
    try:
        with torch.no_grad(), warnings.catch_warnings():
            # They speak of PyTorch's own future, not of this network.
            warnings.simplefilter("ignore")
            program = torch.export.export(
                module, example_inputs(spec), dynamic_shapes=(dynamic_shapes(spec),), strict=False
            )
            torch.export.save(program, path, extra_files={TENSORS: json.dumps(tensors)})
    except Exception as error:  # the exporter raises many kinds
        raise ExportError(f"{spec.name}: export to a program of PyTorch failed, {error}") from error
    return [path]


def read_tensors(path: Path) -> dict[str, Any]:
    """What `TENSORS` says in a program's file, without its weights.

    Raises:
        ExportError: the file cannot be read, or is no program that was exported here.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith(f"/extra/{TENSORS}")]
            tensors: dict[str, Any] = json.loads(archive.read(names[0]))
    except (OSError, zipfile.BadZipFile, ValueError) as error:
        raise ExportError(f"{path}: {error}") from error
    except IndexError:
        raise ExportError(f"{path}: has no {TENSORS}, and is no network of ours") from None
    return tensors
