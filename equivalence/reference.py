"""What the diffusers pipelines make of the cases, in float32 on the CPU."""

import inspect
import json
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image

from darkroom_export.quiet import quieten
from equivalence.cases import FLOW_SCHEDULERS, PROMPT, SCHEDULERS, SEED, SIZE, Case


def picture(number: int) -> Image.Image:
    """A picture with smooth and sharp parts, another one for each number."""
    y, x = np.mgrid[:SIZE, :SIZE] / SIZE
    waves = [np.sin((3 + number + n) * x + (5 - n) * y + n) for n in range(3)]
    levels = np.stack(waves, axis=-1) * 100 + 128
    levels[SIZE // 4 : SIZE // 2, SIZE // 3 : 3 * SIZE // 4] = (30 * number, 220, 90)
    return Image.fromarray(levels.clip(0, 255).astype(np.uint8))


def mask() -> Image.Image:
    """White in a disc off the middle."""
    y, x = np.mgrid[:SIZE, :SIZE] / SIZE
    return Image.fromarray(((x - 0.4) ** 2 + (y - 0.55) ** 2 < 0.09).astype(np.uint8) * 255)


WITHOUT_SHIFT = ("StableDiffusion3InpaintPipeline",)
"""Pipelines that forget the VAE's shift when they decode, in diffusers 0.42: their latents are
right, and are decoded as its other pipelines decode them."""


class Reference:
    """The pipelines over one folder of checkpoints, by architecture."""

    def __init__(self, checkpoints: dict[str, Path], loras: dict[str, Path]) -> None:
        quieten()
        self._checkpoints = checkpoints
        self._loras = loras
        self._loaded = cache(self._load)

    def pictures(self, case: Case) -> list[Image.Image]:
        """One for each picture of the request, each drawn with a seed of its own."""
        count = case.fields.get("num_images_per_prompt", 1)
        return [self._picture(case, SEED + index) for index in range(count)]

    def _picture(self, case: Case, seed: int) -> Image.Image:
        fields = dict(case.fields)
        fields.pop("num_images_per_prompt", None)
        pipeline = self._pipeline(case)
        is_image_only = case.pipeline in (
            "StableDiffusionImg2ImgPipeline",
            "StableDiffusionXLImg2ImgPipeline",
            "LatentConsistencyModelImg2ImgPipeline",
        )
        # These take the size of their picture, which is that.
        size = {} if is_image_only else {"width": SIZE, "height": SIZE}
        given: dict[str, Any] = {"image": picture(1), "mask_image": mask()}
        inputs = {name: given[name] for name in case.pictures}
        options = fields | size | inputs | self._control_inputs(case)
        generator = torch.Generator("cpu").manual_seed(seed)
        is_latent = case.refiner is not None or case.pipeline in WITHOUT_SHIFT
        made = pipeline(
            PROMPT, generator=generator, output_type="latent" if is_latent else "pil", **options
        ).images
        if case.refiner is None:
            image: Image.Image = _decode(pipeline, made) if is_latent else made[0]
            return image
        options["denoising_start"] = options.pop("denoising_end")
        options.pop("width"), options.pop("height")
        refiner = self._with_scheduler(
            self._loaded(case.refiner), "StableDiffusionXLImg2ImgPipeline", case.sampler
        )
        # A new request, with a seed of its own, which is the same.
        generator = torch.Generator("cpu").manual_seed(seed)
        finished: Image.Image = refiner(
            PROMPT, image=made, generator=generator, output_type="pil", **options
        ).images[0]
        return finished

    def _control_inputs(self, case: Case) -> dict[str, Any]:
        if not case.controls:
            return {}
        pictures = [picture(2 + n) for n in range(len(case.controls))]
        name = "control_image" if case.pictures else "image"
        return {
            name: pictures,
            "controlnet_conditioning_scale": [control.scale for control in case.controls],
            "control_guidance_start": [control.start for control in case.controls],
            "control_guidance_end": [control.end for control in case.controls],
        }

    def _pipeline(self, case: Case) -> Any:
        base = self._loaded(case.architecture)
        extra = {}
        if case.controls:
            folders = [self._checkpoints[control.architecture] for control in case.controls]
            networks = [diffusers.ControlNetModel.from_pretrained(folder) for folder in folders]
            extra["controlnet"] = [network.float() for network in networks]
        if case.loras or case.variant:
            # Fusing changes the weights, so that these are read anew.
            base = self._load(case.architecture)
            for name, scale in case.loras or ((case.variant, 1.0),):
                base.load_lora_weights(str(self._loras[name]))
                base.fuse_lora(lora_scale=scale)
                base.unload_lora_weights()
        return self._with_scheduler(base, case.pipeline, case.sampler, **extra)

    def _with_scheduler(self, base: Any, class_name: str, sampler: str, **extra: Any) -> Any:
        kind = getattr(diffusers, class_name)
        components = {**base.components, **extra}
        table = FLOW_SCHEDULERS if "StableDiffusion3" in class_name else SCHEDULERS
        scheduler_name, options = table[sampler]
        scheduler = getattr(diffusers, scheduler_name)
        if not isinstance(base.scheduler, scheduler) or options:
            components["scheduler"] = scheduler.from_config(base.scheduler.config, **options)
        wanted = inspect.signature(kind.__init__).parameters
        kept = {name: part for name, part in components.items() if name in wanted}
        for flag in ("requires_aesthetics_score", "force_zeros_for_empty_prompt"):
            if flag in wanted and flag in base.config:
                kept[flag] = base.config[flag]
        if "requires_safety_checker" in wanted:
            kept |= {"requires_safety_checker": False, "safety_checker": None}
        pipeline = kind(**kept)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def _load(self, architecture: str) -> Any:
        folder = self._checkpoints[architecture]
        # A part that is left out must be said to be.
        index = json.loads((folder / "model_index.json").read_text())
        left_out = {name: None for name, kind in index.items() if kind == [None, None]}
        return diffusers.DiffusionPipeline.from_pretrained(
            folder, torch_dtype=torch.float32, **left_out
        )


def _decode(pipeline: Any, latents: torch.Tensor) -> Image.Image:
    config = pipeline.vae.config
    with torch.no_grad():
        unscaled = latents / config.scaling_factor + config.shift_factor
        pixels = pipeline.vae.decode(unscaled, return_dict=False)[0]
    image: Image.Image = pipeline.image_processor.postprocess(pixels)[0]
    return image
