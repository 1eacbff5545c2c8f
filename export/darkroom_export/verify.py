"""Compare what was exported with PyTorch: each network alone, then all of them in the loop."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray

from darkroom_export.errors import ExportError
from darkroom_export.networks import (
    InputShape,
    NetworkSpec,
    unet_size_factor,
    vae_scale_factor,
)
from darkroom_export.precision import Precision

Array = NDArray[np.float32]

LOOP_PROMPT = "a photograph of an astronaut riding a horse"
LOOP_STEPS = 4
LOOP_GUIDANCE_SCALE = 5.0
LOOP_TOLERANCE = {Precision.FP32: 1e-3, Precision.FP16: 5e-2}
"""Largest error of the final latents, as a fraction of the largest latent."""
PICTURE_TOLERANCE = {Precision.FP32: 1 / 255, Precision.FP16: 4 / 255}
"""Mean absolute error of the picture, in the range 0 to 1."""


@dataclass(frozen=True)
class Reference:
    """PyTorch's float32 answers to random inputs, for one network."""

    cases: list[tuple[tuple[torch.Tensor, ...], tuple[Array, ...]]]
    """Inputs and outputs of each call."""


@dataclass(frozen=True)
class LoopReference:
    """What the diffusers pipeline makes of given noise in float32."""

    noise: torch.Tensor
    token_ids: torch.Tensor
    """(2, 77), the empty prompt and the prompt."""
    latents: Array
    picture: Array
    """(1, 3, H, W) in 0 to 1."""


def network_reference(spec: NetworkSpec, pipeline: Any, seed: int) -> Reference:
    """Run the PyTorch network on fresh random inputs of several batch sizes and shapes."""
    factor = unet_size_factor(pipeline)
    native = min(pipeline.unet.config.sample_size, 64)
    shapes = [
        InputShape(1, native, native),
        InputShape(2, 2 * factor, 4 * factor, chunks=2),
        InputShape(3, 4 * factor, 2 * factor),
        InputShape(5, 2 * factor, 2 * factor, chunks=3),
    ]
    generator = torch.Generator().manual_seed(seed)
    cases = []
    with torch.no_grad():
        for shape in shapes:
            inputs = spec.example(generator, shape)
            outputs = spec.module(*inputs)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            cases.append((inputs, tuple(output.numpy() for output in outputs)))
    return Reference(cases)


def verify_network(
    spec: NetworkSpec, reference: Reference, path: Path, precision: Precision
) -> dict[str, Any]:
    """Run the ONNX file on the reference's inputs; returns the manifest's record of the result.

    Raises:
        ExportError: an output has another shape, is not finite, or is off by more than allowed.
    """
    session = open_session(path)
    errors = dict.fromkeys((tensor.name for tensor in spec.outputs), 0.0)
    shapes = []
    for inputs, expected in reference.cases:
        actual = run(session, *(tensor.numpy() for tensor in inputs))
        shapes.append([list(tensor.shape) for tensor in inputs])
        for output, ours, theirs in zip(errors, actual, expected, strict=True):
            name = f"{spec.name}: {output}"
            if ours.shape != theirs.shape:
                raise ExportError(f"{name} is {ours.shape}, PyTorch's is {theirs.shape}")
            errors[output] = max(errors[output], relative_error(name, ours, theirs))
    tolerance = spec.tolerance[precision]
    for output, error in errors.items():
        if error > tolerance:
            raise ExportError(
                f"{spec.name}: {output} of {precision} ONNX differs from PyTorch's by "
                f"{error:.2e} of its range, allowed is {tolerance:.0e}"
            )
    return {
        "error": max(errors.values()),
        "errors": errors,
        "tolerance": tolerance,
        "input_shapes": shapes,
    }


def loop_reference(pipeline: Any, seed: int) -> LoopReference:
    """Run the diffusers pipeline: few steps, guided, at a small size."""
    factor = vae_scale_factor(pipeline)
    size = min(pipeline.unet.config.sample_size * factor, 256)
    generator = torch.Generator().manual_seed(seed)
    shape = (1, pipeline.unet.config.in_channels, size // factor, size // factor)
    noise = torch.randn(shape, generator=generator)
    tokens = pipeline.tokenizer(
        ["", LOOP_PROMPT],
        padding="max_length",
        max_length=pipeline.tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )
    pipeline.set_progress_bar_config(disable=True)
    with torch.no_grad():
        latents = pipeline(
            LOOP_PROMPT,
            num_inference_steps=LOOP_STEPS,
            guidance_scale=LOOP_GUIDANCE_SCALE,
            width=size,
            height=size,
            latents=noise,
            output_type="latent",
        ).images
        scaled = latents / pipeline.vae.config.scaling_factor
        picture = _to_unit(pipeline.vae.decode(scaled).sample.numpy())
    return LoopReference(noise, tokens.input_ids, latents.numpy(), picture)


def verify_loop(
    reference: LoopReference,
    scheduler: Any,
    scaling_factor: float,
    paths: dict[str, Path],
    precision: Precision,
) -> dict[str, Any]:
    """Run the same loop over the ONNX networks; returns the manifest's record of the result.

    Raises:
        ExportError: the final latents or the picture are off by more than allowed.
    """
    hidden, *_ = run(open_session(paths["text_encoder"]), reference.token_ids.numpy())
    unet = open_session(paths["unet"])
    latents = reference.noise
    scheduler.set_timesteps(LOOP_STEPS)
    for timestep in scheduler.timesteps:
        sample = latents.repeat(2, 1, 1, 1).numpy()
        (output,) = run(unet, sample, np.full(2, float(timestep), np.float32), hidden)
        unconditional, conditional = torch.from_numpy(output).chunk(2)
        guided = unconditional + LOOP_GUIDANCE_SCALE * (conditional - unconditional)
        latents = scheduler.step(guided, timestep, latents).prev_sample
    decoder = open_session(paths["vae_decoder"])
    (pixels,) = run(decoder, latents.numpy() / scaling_factor)
    picture = _to_unit(pixels)

    error = relative_error("the loop: its result", latents.numpy(), reference.latents)
    picture_error = float(np.abs(picture - reference.picture).mean())
    tolerance, picture_tolerance = LOOP_TOLERANCE[precision], PICTURE_TOLERANCE[precision]
    # Written so that an error that is not a number is refused too.
    if not (error <= tolerance and picture_error <= picture_tolerance):
        raise ExportError(
            f"the loop over the {precision} networks differs from diffusers: latents by "
            f"{error:.2e} of their range (allowed {tolerance:.0e}), picture by "
            f"{255 * picture_error:.2f}/255 on average (allowed {255 * picture_tolerance:.0f}/255)"
        )
    return {
        "num_inference_steps": LOOP_STEPS,
        "guidance_scale": LOOP_GUIDANCE_SCALE,
        "error": error,
        "tolerance": tolerance,
        "picture_error": picture_error,
        "picture_tolerance": picture_tolerance,
    }


def open_session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(
        str(path), sess_options=options, providers=["CPUExecutionProvider"]
    )


def run(session: onnxruntime.InferenceSession, *inputs: NDArray[Any]) -> list[Array]:
    """The session's outputs, for inputs in the graph's order."""
    names: Sequence[str] = [entry.name for entry in session.get_inputs()]
    outputs: list[Array] = session.run(None, dict(zip(names, inputs, strict=True)))
    return outputs


def relative_error(name: str, actual: Array, expected: Array) -> float:
    """Largest difference, as a fraction of the largest expected value.

    Raises:
        ExportError: one of the two holds something that is not a finite number.
    """
    if not np.isfinite(expected).all():
        raise ExportError(f"{name} of PyTorch is not finite, the weights are broken")
    if not np.isfinite(actual).all():
        raise ExportError(f"{name} is not finite, the precision may be too low for it")
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def _to_unit(sample: Array) -> Array:
    return np.clip(sample / 2 + 0.5, 0, 1)
