"""Compare an exported network with PyTorch, on fresh random inputs."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from darkroom_export.device import CPU
from darkroom_export.errors import ExportError
from darkroom_export.families import Family, size_factor
from darkroom_export.networks import InputShape, NetworkSpec
from darkroom_export.precision import Precision
from darkroom_export.runner import Array, open_network


@dataclass(frozen=True)
class Reference:
    """PyTorch's float32 answers to random inputs, for one network."""

    cases: list[tuple[tuple[torch.Tensor, ...], tuple[Array, ...]]]
    """Inputs and outputs of each call."""


def input_shapes(pipeline: Any, family: Family) -> list[InputShape]:
    """Several batch sizes, sizes of picture and lengths of prompt to compare with."""
    factor = size_factor(pipeline, family)
    native = min(getattr(pipeline, family.denoiser).config.sample_size, 64)
    tokens = family.t5_length
    return [
        InputShape(1, native, native, sequence=77 + tokens),
        InputShape(2, 2 * factor, 4 * factor, sequence=2 * 77 + tokens),
        InputShape(3, 4 * factor, 2 * factor, sequence=77 + tokens),
        InputShape(5, 2 * factor, 2 * factor, sequence=3 * 77 + tokens),
    ]


def network_reference(
    spec: NetworkSpec, shapes: Sequence[InputShape], seed: int, device: torch.device = CPU
) -> Reference:
    """Run the PyTorch network on fresh random inputs.

    It is left converted to float32, and on the device.
    """
    # Moved before it becomes larger.
    spec.module.eval().to(device).to(torch.float32)
    generator = torch.Generator().manual_seed(seed)
    cases = []
    with torch.no_grad():
        for shape in shapes:
            inputs = spec.example(generator, shape)
            outputs = spec.module(*(tensor.to(device) for tensor in inputs))
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            cases.append((inputs, tuple(output.cpu().numpy() for output in outputs)))
    return Reference(cases)


def verify_network(
    spec: NetworkSpec,
    reference: Reference,
    path: Path,
    precision: Precision,
    device: torch.device = CPU,
) -> dict[str, Any]:
    """Run the exported network on the reference's inputs; returns the manifest's record of it.

    Raises:
        ExportError: an output has another shape, is not finite, or is off by more than allowed.
    """
    run = open_network(path, device)
    errors = dict.fromkeys((tensor.name for tensor in spec.outputs), 0.0)
    shapes = []
    for inputs, expected in reference.cases:
        names = [tensor.name for tensor in spec.inputs]
        feed = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
        actual = run(feed, list(errors))
        shapes.append([list(tensor.shape) for tensor in inputs])
        for output, ours, theirs in zip(errors, actual, expected, strict=True):
            name = f"{spec.name}: {output}"
            if ours.shape != theirs.shape:
                raise ExportError(f"{name} is {ours.shape}, PyTorch's is {theirs.shape}")
            errors[output] = max(errors[output], relative_error(name, ours, theirs))
    tolerance = allowed_error(spec, precision, path, device)
    for output, error in errors.items():
        if error > tolerance:
            raise ExportError(
                f"{spec.name}: {output} of {path.name} in {spec.precision(precision)} differs from "
                f"PyTorch's by {error:.2e} of its range, allowed is {tolerance:.0e}"
            )
    return {
        "error": max(errors.values()),
        "errors": errors,
        "tolerance": tolerance,
        "input_shapes": shapes,
    }


def allowed_error(
    spec: NetworkSpec, precision: Precision, path: Path, device: torch.device
) -> float:
    """How far a network's outputs may be off, as a fraction of their range, where it is run."""
    own = spec.precision(precision)
    # What a GPU runs is a program, in which others than fp32 exports let it cut the numbers of
    # convolutions to TF32, also where the network itself is kept in float32, as SDXL's VAE.
    is_cut = device.type != "cpu" and path.suffix == ".pt2" and precision is not Precision.FP32
    if is_cut and own is Precision.FP32:
        # As many bits are behind the point.
        own = Precision.FP16
    return spec.tolerance[own]


def relative_error(name: str, actual: Array, expected: Array) -> float:
    """Largest difference, as a fraction of the largest expected value.

    Raises:
        ExportError: one of the two holds something that is not a finite number.
    """
    if not np.isfinite(expected).all():
        raise ExportError(f"{name} of PyTorch is not finite, the weights are broken")
    if not np.isfinite(actual).all():
        raise ExportError(f"{name} is not finite, the precision may be too low for it")
    # Of zeros alone, the difference itself.
    largest = float(np.abs(expected).max()) or 1.0
    return float(np.abs(actual - expected).max()) / largest
