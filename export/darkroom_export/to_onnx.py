"""A PyTorch network to an ONNX file."""

import warnings
from pathlib import Path
from typing import cast

import onnx
import torch

from darkroom_export.capture import Positional, dynamic_shapes, example_inputs
from darkroom_export.errors import ExportError
from darkroom_export.networks import NetworkSpec
from darkroom_export.precision import Precision

MAX_EMBEDDED_BYTES = 1 << 30
"""Weights above this go to a file beside the graph: a protobuf file ends at 2 GiB."""


def export_onnx(spec: NetworkSpec, precision: Precision, path: Path) -> list[Path]:
    """Write `spec` as ONNX in the given precision; returns the files written, the graph first.

    The module is left converted to that precision.

    Raises:
        ExportError: PyTorch cannot export the network, or ONNX refuses the result.
    """
    spec.convert(precision)
    num_bytes = sum(tensor.nbytes for tensor in spec.module.state_dict().values())
    is_external = num_bytes > MAX_EMBEDDED_BYTES
    try:
        with torch.no_grad(), warnings.catch_warnings():
            # They speak of PyTorch's own future and of torchvision, not of this network.
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                Positional(spec.module.eval()),
                example_inputs(spec),
                dynamo=True,
                verbose=False,
                dynamic_shapes=(dynamic_shapes(spec),),
                input_names=[tensor.name for tensor in spec.inputs],
                output_names=[tensor.name for tensor in spec.outputs],
            )
            cast(torch.onnx.ONNXProgram, program).save(path, external_data=is_external)
        # By path, because a graph with external weights cannot be checked in memory.
        onnx.checker.check_model(path)
    except Exception as error:  # the exporter raises many kinds
        raise ExportError(f"{spec.name}: export to ONNX failed, {error}") from error
    external = path.with_name(f"{path.name}.data")
    return [path, external] if is_external else [path]
