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


def _cases() -> list[Case]:
    text = {"guidance_scale": 5.0, "num_inference_steps": 8}
    guided = text | {"negative_prompt": NEGATIVE_PROMPT}
    image, both = ("image",), ("image", "mask_image")
    sd, sdxl, sd3 = "StableDiffusion", "StableDiffusionXL", "StableDiffusion3"
    part = guided | {"strength": 0.6}
    whole = guided | {"strength": 1.0}
    canny = Control("canny", "tiny-sd15-controlnet", 0.8)
    depth = Control("depth", "tiny-sd15-controlnet", 1.2, 0.25, 0.75)
    xl_canny = Control("canny", "tiny-sdxl-controlnet", 0.8)
    sizes = {
        "original_size": (96, 200),
        "crops_coords_top_left": (8, 16),
        "target_size": (128, 120),
    }
    cases = []
    for family, architecture, samplers in (
        (sd, "tiny-sd15", ("unipc", "dpmpp_2m_karras", "euler_ancestral", "dpmpp_sde")),
        (sd, "tiny-sd21", ("unipc", "euler", "ddim")),
        (sdxl, "tiny-sdxl", ("unipc", "euler", "dpmpp_sde")),
        (sd3, "tiny-sd3", ("euler", "unipc")),
        (sd3, "tiny-sd3-no-t5", ("euler",)),
    ):
        first, *others = samplers
        cases += [
            Case(architecture, "text to image", f"{family}Pipeline", first, text),
            Case(architecture, "negative prompt", f"{family}Pipeline", first, guided),
            Case(architecture, "image to image", f"{family}Img2ImgPipeline", first, part, image),
            Case(architecture, "inpainting", f"{family}InpaintPipeline", first, whole, both),
            Case(architecture, "inpainting in part", f"{family}InpaintPipeline", first, part, both),
        ]
        for sampler in others:
            cases.append(Case(architecture, sampler, f"{family}Pipeline", sampler, guided))
            # diffusers' UniPC cannot put noise on a picture in SD3's pipeline.
            if family != sd3:
                name, pipeline = f"image to image, {sampler}", f"{family}Img2ImgPipeline"
                cases.append(Case(architecture, name, pipeline, sampler, part, image))
    cases += [
        Case(
            "tiny-sd15", "guidance_rescale", f"{sd}Pipeline", "unipc",
            guided | {"guidance_rescale": 0.7},
        ),
        Case("tiny-sd15", "several pictures", f"{sd}Pipeline", "unipc",
             text | {"num_images_per_prompt": 3}),
        Case("tiny-sd15", "no guidance", f"{sd}Pipeline", "unipc", text | {"guidance_scale": 1.0}),
        Case("tiny-sd15", "ControlNet", f"{sd}ControlNetPipeline", "unipc", guided, controls=(canny,)),
        Case("tiny-sd15", "two ControlNets", f"{sd}ControlNetPipeline", "unipc", guided,
             controls=(canny, depth)),
        Case("tiny-sd15", "ControlNet, image to image", f"{sd}ControlNetImg2ImgPipeline", "unipc",
             part, image, controls=(canny,)),
        Case("tiny-sd15", "ControlNet, inpainting", f"{sd}ControlNetInpaintPipeline", "unipc",
             whole, both, controls=(canny,)),
        Case("tiny-sd15", "LoRA of the request", f"{sd}Pipeline", "unipc", guided,
             loras=(("ink", 0.8),)),
        Case("tiny-sd15", "two LoRAs of the request", f"{sd}Pipeline", "unipc", guided,
             loras=(("ink", 0.5), ("pixelart", 1.5))),
        Case("tiny-sd15", "LoRA fused at export", f"{sd}Pipeline", "unipc", guided,
             variant="watercolor"),
        Case("tiny-sd15-inpaint", "inpainting", f"{sd}InpaintPipeline", "unipc", whole, both),
        Case("tiny-sd15-inpaint", "inpainting in part", f"{sd}InpaintPipeline", "unipc", part, both),
        Case("tiny-lcm", "text to image", "LatentConsistencyModelPipeline", "lcm",
             {"guidance_scale": 8.5, "num_inference_steps": 4}),
        Case("tiny-lcm", "image to image", "LatentConsistencyModelImg2ImgPipeline", "lcm",
             {"guidance_scale": 8.5, "num_inference_steps": 4, "strength": 0.75}, image),
        Case("tiny-turbo", "one step", f"{sd}Pipeline", "euler",
             {"guidance_scale": 0.0, "num_inference_steps": 1}),
        Case("tiny-turbo", "image to image", f"{sd}Img2ImgPipeline", "euler",
             {"guidance_scale": 0.0, "num_inference_steps": 4, "strength": 0.5}, image),
        Case("tiny-sdxl", "sizes", f"{sdxl}Pipeline", "unipc", guided | sizes),
        Case("tiny-sdxl", "ControlNet", f"{sdxl}ControlNetPipeline", "unipc", guided,
             controls=(xl_canny,)),
        Case("tiny-sdxl", "base and refiner", f"{sdxl}Pipeline", "euler",
             guided | {"denoising_end": 0.7}, refiner="tiny-sdxl-refiner"),
        Case("tiny-sdxl-turbo", "one step", f"{sdxl}Pipeline", "euler_ancestral",
             {"guidance_scale": 0.0, "num_inference_steps": 1}),
        Case("tiny-sdxl-turbo", "four steps", f"{sdxl}Pipeline", "euler_ancestral",
             {"guidance_scale": 0.0, "num_inference_steps": 4}),
        Case("tiny-sdxl-inpaint", "inpainting", f"{sdxl}InpaintPipeline", "unipc",
             whole, both),
        Case("tiny-sdxl-refiner", "image to image", f"{sdxl}Img2ImgPipeline", "unipc", part, image),
        Case("tiny-sdxl-refiner", "aesthetic scores", f"{sdxl}Img2ImgPipeline", "unipc",
             part | {"aesthetic_score": 9.0, "negative_aesthetic_score": 1.0}, image),
    ]
    return cases


CASES = _cases()
