"""The table of what is compared: a request, and the diffusers pipeline that answers it too.

Requests name samplers, pipelines have schedulers: `SCHEDULERS` ties them together. All else of a
case is said once: the same keywords go to both, but for those that a pipeline calls otherwise.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

SIZE = 128
"""Pixels a side: enough for all levels of the small checkpoints."""
SEED = 11
PROMPT = "a large red circle on a blue background"
NEGATIVE_PROMPT = "blurry"

SCHEDULERS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "unipc": ("UniPCMultistepScheduler", {}),
    "dpmpp_2m_karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "dpmpp_sde": ("DPMSolverSinglestepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "lcm": ("LCMScheduler", {}),
}
FLOW_SCHEDULERS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "euler": ("FlowMatchEulerDiscreteScheduler", {}),
    "unipc": (
        "UniPCMultistepScheduler",
        {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0},
    ),
}


@dataclass(frozen=True)
class Control:
    """A ControlNet of a case, and the checkpoint that it comes from."""

    name: str
    architecture: str
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0


@dataclass(frozen=True)
class Case:
    """One comparison."""

    architecture: str
    name: str
    pipeline: str
    """diffusers' class, made of the checkpoint's components."""
    sampler: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    """What request and pipeline are both given."""
    pictures: tuple[str, ...] = ()
    """Of `image` and `mask_image`, those that both are given."""
    controls: tuple[Control, ...] = ()
    loras: tuple[tuple[str, float], ...] = ()
    variant: str | None = None
    refiner: str | None = None
    """The architecture that finishes what this one begins."""


_SD, _SDXL, _SD3 = "StableDiffusion", "StableDiffusionXL", "StableDiffusion3"
_TEXT = {"guidance_scale": 5.0, "num_inference_steps": 8}
_NEGATIVE = _TEXT | {"negative_prompt": NEGATIVE_PROMPT}
_PART = _NEGATIVE | {"strength": 0.6}
_WHOLE = _NEGATIVE | {"strength": 1.0}
_LCM = {"guidance_scale": 8.5, "num_inference_steps": 4}
_TURBO = {"guidance_scale": 0.0, "num_inference_steps": 4}
_IMAGE = ("image",)
_MASKED = ("image", "mask_image")
_SIZES = {
    "original_size": (96, 200),
    "crops_coords_top_left": (8, 16),
    "target_size": (128, 120),
}
_CANNY = Control("canny", "tiny-sd15-controlnet", 0.8)
_DEPTH = Control("depth", "tiny-sd15-controlnet", 1.2, 0.25, 0.75)
_XL_CANNY = Control("canny", "tiny-sdxl-controlnet", 0.8)
_SAMPLERS = {
    "tiny-sd15": (_SD, ("unipc", "dpmpp_2m_karras", "euler_ancestral", "dpmpp_sde")),
    "tiny-sd21": (_SD, ("unipc", "euler", "ddim")),
    "tiny-sdxl": (_SDXL, ("unipc", "euler", "dpmpp_sde")),
    "tiny-sd3": (_SD3, ("euler", "unipc")),
    "tiny-sd3-no-t5": (_SD3, ("euler",)),
}


def _every_mode(architecture: str, family: str, sampler: str) -> list[Case]:
    def case(name: str, kind: str, fields: Mapping[str, Any], pictures: tuple[str, ...]) -> Case:
        return Case(architecture, name, f"{family}{kind}", sampler, fields, pictures)

    return [
        case("text to image", "Pipeline", _TEXT, ()),
        case("negative prompt", "Pipeline", _NEGATIVE, ()),
        case("image to image", "Img2ImgPipeline", _PART, _IMAGE),
        case("inpainting", "InpaintPipeline", _WHOLE, _MASKED),
        case("inpainting in part", "InpaintPipeline", _PART, _MASKED),
    ]


def _another_sampler(architecture: str, family: str, sampler: str) -> list[Case]:
    cases = [Case(architecture, sampler, f"{family}Pipeline", sampler, _NEGATIVE)]
    # diffusers' UniPC cannot put noise on a picture in SD3's pipeline.
    if family != _SD3:
        name, pipeline = f"image to image, {sampler}", f"{family}Img2ImgPipeline"
        cases.append(Case(architecture, name, pipeline, sampler, _PART, _IMAGE))
    return cases


def _sd15(name: str, kind: str = "", fields: Mapping[str, Any] = _NEGATIVE, **more: Any) -> Case:
    return Case("tiny-sd15", name, f"{_SD}{kind}Pipeline", "unipc", fields, **more)


_FAMILIES = [
    case
    for architecture, (family, (first, *others)) in _SAMPLERS.items()
    for case in (
        *_every_mode(architecture, family, first),
        *(it for sampler in others for it in _another_sampler(architecture, family, sampler)),
    )
]
_CONDITIONS = [
    _sd15("guidance_rescale", fields=_NEGATIVE | {"guidance_rescale": 0.7}),
    _sd15("several pictures", fields=_TEXT | {"num_images_per_prompt": 3}),
    _sd15("no guidance", fields=_TEXT | {"guidance_scale": 1.0}),
    _sd15("ControlNet", "ControlNet", controls=(_CANNY,)),
    _sd15("two ControlNets", "ControlNet", controls=(_CANNY, _DEPTH)),
    _sd15(
        "ControlNet, image to image",
        "ControlNetImg2Img",
        _PART,
        pictures=_IMAGE,
        controls=(_CANNY,),
    ),
    _sd15(
        "ControlNet, inpainting", "ControlNetInpaint", _WHOLE, pictures=_MASKED, controls=(_CANNY,)
    ),
    _sd15("LoRA of the request", loras=(("ink", 0.8),)),
    _sd15("two LoRAs of the request", loras=(("ink", 0.5), ("pixelart", 1.5))),
    _sd15("LoRA fused at export", variant="watercolor"),
    Case("tiny-sdxl", "sizes", f"{_SDXL}Pipeline", "unipc", _NEGATIVE | _SIZES),
    Case(
        "tiny-sdxl",
        "ControlNet",
        f"{_SDXL}ControlNetPipeline",
        "unipc",
        _NEGATIVE,
        controls=(_XL_CANNY,),
    ),
    Case(
        "tiny-sdxl",
        "base and refiner",
        f"{_SDXL}Pipeline",
        "euler",
        _NEGATIVE | {"denoising_end": 0.7},
        refiner="tiny-sdxl-refiner",
    ),
]
_CHECKPOINTS = [
    Case("tiny-sd15-inpaint", "inpainting", f"{_SD}InpaintPipeline", "unipc", _WHOLE, _MASKED),
    Case("tiny-sd15-inpaint", "in part", f"{_SD}InpaintPipeline", "unipc", _PART, _MASKED),
    Case("tiny-lcm", "text to image", "LatentConsistencyModelPipeline", "lcm", _LCM),
    Case(
        "tiny-lcm",
        "image to image",
        "LatentConsistencyModelImg2ImgPipeline",
        "lcm",
        _LCM | {"strength": 0.75},
        _IMAGE,
    ),
    Case("tiny-turbo", "one step", f"{_SD}Pipeline", "euler", _TURBO | {"num_inference_steps": 1}),
    Case(
        "tiny-turbo",
        "image to image",
        f"{_SD}Img2ImgPipeline",
        "euler",
        _TURBO | {"strength": 0.5},
        _IMAGE,
    ),
    Case(
        "tiny-sdxl-turbo",
        "one step",
        f"{_SDXL}Pipeline",
        "euler_ancestral",
        _TURBO | {"num_inference_steps": 1},
    ),
    Case("tiny-sdxl-turbo", "four steps", f"{_SDXL}Pipeline", "euler_ancestral", _TURBO),
    Case("tiny-sdxl-inpaint", "inpainting", f"{_SDXL}InpaintPipeline", "unipc", _WHOLE, _MASKED),
    Case("tiny-sdxl-refiner", "image to image", f"{_SDXL}Img2ImgPipeline", "unipc", _PART, _IMAGE),
    Case(
        "tiny-sdxl-refiner",
        "aesthetic scores",
        f"{_SDXL}Img2ImgPipeline",
        "unipc",
        _PART | {"aesthetic_score": 9.0, "negative_aesthetic_score": 1.0},
        _IMAGE,
    ),
]
CASES = [*_FAMILIES, *_CONDITIONS, *_CHECKPOINTS]
