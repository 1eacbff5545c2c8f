"""One comparison: what was served, what diffusers makes, and how far apart they are."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from equivalence.cases import PROMPT, SEED, SIZE, Case
from equivalence.reference import Reference, mask, picture

Generate = Callable[..., Sequence[Image.Image]]
"""Asks a model for pictures: (architecture, prompt, **options of the SDK)."""

TOLERANCE = 1 / 255
"""Of the mean absolute difference, levels in 0 to 1."""


@dataclass(frozen=True)
class Comparison:
    """How far a served picture is from diffusers', in levels of 255."""

    case: Case
    mean: float
    max: float
    other: float
    """The mean difference to a picture of another seed, to see that the measure can tell."""

    @property
    def is_equal(self) -> bool:
        return self.mean <= 255 * TOLERANCE < self.other


def compare(case: Case, reference: Reference, generate: Generate) -> Comparison:
    """Ask for the case's pictures, and diffusers for the same."""
    expected = [_levels(it) for it in reference.pictures(case)]
    served, others = (
        [_levels(it) for it in _serve(case, generate, seed)] for seed in (SEED, SEED + 100)
    )
    if [it.shape for it in served] != [it.shape for it in expected]:
        raise AssertionError(f"{case.architecture}, {case.name}: other sizes than diffusers'")
    differences = np.abs(np.array(served) - np.array(expected))
    return Comparison(
        case,
        float(differences.mean()),
        float(differences.max()),
        float(np.abs(np.array(others) - np.array(expected)).mean()),
    )


def _serve(case: Case, generate: Generate, seed: int) -> Sequence[Image.Image]:
    options = options_of(case) | {"seed": seed}
    if case.refiner is None:
        return generate(case.architecture, PROMPT, **options)
    (latents,) = generate(case.architecture, PROMPT, **options, output_format="latent")
    for name in ("denoising_end", "width", "height"):
        options.pop(name)
    options |= {"image": latents, "denoising_start": case.fields["denoising_end"]}
    return generate(case.refiner, PROMPT, **options)


def options_of(case: Case) -> dict[str, Any]:
    """The options of the SDK for a case, but for the seed."""
    given = {"image": picture(1), "mask_image": mask()}
    options = {"width": SIZE, "height": SIZE, "sampler": case.sampler, **case.fields}
    options |= {name: given[name] for name in case.pictures}
    if case.controls:
        options |= {
            "controlnet": [control.name for control in case.controls],
            "control_image": [picture(2 + n) for n in range(len(case.controls))],
            "controlnet_conditioning_scale": [control.scale for control in case.controls],
            "control_guidance_start": [control.start for control in case.controls],
            "control_guidance_end": [control.end for control in case.controls],
        }
    if case.loras:
        options["lora"] = dict(case.loras)
    if case.variant:
        options["variant"] = case.variant
    return options


def _levels(image: Image.Image) -> np.ndarray[Any, Any]:
    return np.asarray(image, np.float32)
