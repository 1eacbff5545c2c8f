"""Compare the whole denoising loop over the exported networks with the diffusers pipeline."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from numpy.typing import NDArray

from darkroom_export.device import CPU
from darkroom_export.errors import ExportError
from darkroom_export.families import Family, text_encoders, vae_scale_factor
from darkroom_export.networks import InputShape, NetworkSpec
from darkroom_export.precision import Precision, in_float32
from darkroom_export.preview import synthetic_picture
from darkroom_export.runner import Array, Run, open_network
from darkroom_export.verify import relative_error

PROMPT = "a photograph of an astronaut riding a horse"
NUM_STEPS = 4
GUIDANCE_SCALE = 5.0
TOLERANCE = {Precision.FP32: 1e-3, Precision.FP16: 5e-2, Precision.BF16: 2e-1}
"""Largest error of the final latents, as a fraction of the largest latent."""
PICTURE_TOLERANCE = {Precision.FP32: 1 / 255, Precision.FP16: 4 / 255, Precision.BF16: 16 / 255}
"""Mean absolute error of the picture, in the range 0 to 1."""

# diffusers' defaults, for the rows of the empty prompt and of the prompt.
_AESTHETIC_SCORES = (2.5, 6.0)
_EMBEDDINGS = (
    "prompt_embeds",
    "negative_prompt_embeds",
    "pooled_prompt_embeds",
    "negative_pooled_prompt_embeds",
)


@dataclass(frozen=True)
class Mask:
    """What an inpainting UNet sees besides the latents."""

    masked_picture: torch.Tensor
    """(1, 3, H, W) in -1 to 1, grey where it is to be painted."""
    mask: torch.Tensor
    """(1, 1, h, w), 1 where it is to be painted."""
    seed: int
    """Of the noise in the masked picture's latents."""


@dataclass(frozen=True)
class LoopReference:
    """What the diffusers pipeline makes of given noise in float32, and all that it was given."""

    family: Family
    scheduler: Any
    scaling_factor: float
    shift_factor: float
    is_guided: bool
    """There is a row of the empty prompt before that of the prompt."""
    is_negative_zero: bool
    """The row of the empty prompt has zeros for embeddings."""
    text_width: int
    token_ids: Mapping[str, torch.Tensor]
    """(rows, tokens) by text encoder."""
    conditions: Mapping[str, Array]
    """Inputs of the denoiser that no network makes, by name."""
    mask: Mask | None
    noise: torch.Tensor
    latents: Array
    picture: Array
    """(1, 3, H, W) in 0 to 1."""


def loop_reference(
    pipeline: Any, family: Family, seed: int, device: torch.device = CPU
) -> LoopReference:
    """Run the diffusers pipeline: few steps, guided where it can be, at a small size."""
    denoiser, vae = getattr(pipeline, family.denoiser), pipeline.vae
    factor = vae_scale_factor(pipeline)
    size = min(denoiser.config.sample_size * factor, 256)
    generator = torch.Generator().manual_seed(seed)
    shape = (1, vae.config.latent_channels, size // factor, size // factor)
    noise = torch.randn(shape, generator=generator)
    guidance_size = denoiser.config.get("time_cond_proj_dim")
    is_guided = guidance_size is None
    picture, mask = _picture_and_mask(size, generator)
    # One after the other: all networks in float32 at once would need much more memory.
    with torch.no_grad(), in_float32(*_modules(pipeline, family), device=device):
        embeddings = _encoded(pipeline, family, device, is_guided=is_guided)
    with torch.no_grad(), in_float32(denoiser, vae, device=device):
        run_pipeline = _without_text_encoders(pipeline, family)
        latents = run_pipeline(
            **embeddings,
            **_task(run_pipeline, size, picture, mask, seed),
            num_inference_steps=NUM_STEPS,
            guidance_scale=GUIDANCE_SCALE,
            latents=noise.to(device),
            output_type="latent",
        ).images
        shift_factor = float(vae.config.get("shift_factor") or 0.0)
        unscaled = latents / vae.config.scaling_factor + shift_factor
        expected = _to_unit(vae.decode(unscaled).sample.cpu().numpy())
        conditions = _numbers(family, size, is_guided=is_guided)
        if guidance_size is not None:
            scale = torch.tensor([GUIDANCE_SCALE - 1])
            embedded = run_pipeline.get_guidance_scale_embedding(scale, guidance_size)
            conditions["timestep_cond"] = embedded.cpu().numpy()
    return LoopReference(
        family=family,
        scheduler=pipeline.scheduler,
        scaling_factor=float(vae.config.scaling_factor),
        shift_factor=shift_factor,
        is_guided=is_guided,
        is_negative_zero=bool(pipeline.config.get("force_zeros_for_empty_prompt")),
        text_width=embeddings["prompt_embeds"].shape[-1],
        token_ids=_token_ids(pipeline, family, is_guided=is_guided),
        conditions=conditions,
        mask=_masked(picture, mask, factor, seed) if is_inpainting(pipeline) else None,
        noise=noise,
        latents=latents.cpu().numpy(),
        picture=expected,
    )


def is_inpainting(pipeline: Any) -> bool:
    """Whether the denoiser sees a mask and a masked picture beside the latents."""
    unet = getattr(pipeline, "unet", None)
    return unet is not None and unet.config.in_channels > pipeline.vae.config.latent_channels


def _modules(pipeline: Any, family: Family) -> list[Any]:
    return [getattr(pipeline, encoder.network) for encoder in text_encoders(family, pipeline)]


def _encoded(
    pipeline: Any, family: Family, device: torch.device, *, is_guided: bool
) -> dict[str, torch.Tensor]:
    """The pipeline's embeddings of the prompt and, where it guides, of the empty one."""
    others = {"prompt_2": None, "prompt_3": None} if family.denoiser == "transformer" else {}
    embeddings = pipeline.encode_prompt(
        prompt=PROMPT,
        **others,
        device=device,
        num_images_per_prompt=1,
        do_classifier_free_guidance=is_guided,
    )
    # Earlier pipelines have no pooled embeddings.
    named = zip(_EMBEDDINGS, embeddings, strict=False)
    return {name: tensor for name, tensor in named if tensor is not None}


def _without_text_encoders(pipeline: Any, family: Family) -> Any:
    """The pipeline class that does what the denoiser was trained for, on the same networks."""
    is_xl, is_masked = bool(family.time_ids), is_inpainting(pipeline)
    if family.denoiser == "transformer":
        kind = diffusers.StableDiffusion3Pipeline
    elif "aesthetic_score" in family.time_ids:
        kind = diffusers.StableDiffusionXLImg2ImgPipeline
    elif is_xl:
        kind = (
            diffusers.StableDiffusionXLInpaintPipeline
            if is_masked
            else diffusers.StableDiffusionXLPipeline
        )
    else:
        kind = (
            diffusers.StableDiffusionInpaintPipeline
            if is_masked
            else diffusers.StableDiffusionPipeline
        )
    components = dict(pipeline.components)
    components |= {name: None for name in components if name.startswith("text_encoder")}
    if not is_xl and family.denoiser == "unet":
        components |= {"safety_checker": None, "requires_safety_checker": False}
    if is_xl:
        flags = ("force_zeros_for_empty_prompt", "requires_aesthetics_score")
        components |= {key: pipeline.config[key] for key in flags if key in pipeline.config}
        components["add_watermarker"] = False
    made = kind(**{key: components[key] for key in components if key in _parameters(kind)})
    made.set_progress_bar_config(disable=True)
    return made


def _parameters(kind: Any) -> set[str]:
    return set(inspect.signature(kind.__init__).parameters)


def _task(
    pipeline: Any, size: int, picture: torch.Tensor, mask: torch.Tensor, seed: int
) -> dict[str, Any]:
    """The arguments that a pipeline's task needs besides the prompt and the noise."""
    name = type(pipeline).__name__
    if "Img2Img" in name:
        return {"image": picture, "strength": 1.0}
    if "Inpaint" in name:
        generator = torch.Generator().manual_seed(seed)
        masked = {"image": picture, "mask_image": mask, "strength": 1.0, "generator": generator}
        return masked | {"width": size, "height": size}
    return {"width": size, "height": size}


def _picture_and_mask(size: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """(1, 3, size, size) in 0 to 1, and (1, 1, size, size) that hides its left half."""
    picture = synthetic_picture(1, size, generator) / 2 + 0.5
    mask = torch.zeros(1, 1, size, size)
    mask[..., : size // 2] = 1
    return picture, mask


def _masked(picture: torch.Tensor, mask: torch.Tensor, factor: int, seed: int) -> Mask:
    return Mask((2 * picture - 1) * (mask < 0.5), mask[..., ::factor, ::factor], seed)


def _numbers(family: Family, size: int, *, is_guided: bool) -> dict[str, Array]:
    """SDXL's numbers, for each row."""
    if not family.time_ids:
        return {}
    scores = _AESTHETIC_SCORES if is_guided else _AESTHETIC_SCORES[1:]
    rows = []
    for score in scores:
        values = {
            "original_size": (size, size),
            "crops_coords_top_left": (0, 0),
            "target_size": (size, size),
            "aesthetic_score": (score,),
        }
        rows.append([number for name in family.time_ids for number in values[name]])
    return {"time_ids": np.array(rows, np.float32)}


def _token_ids(pipeline: Any, family: Family, *, is_guided: bool) -> dict[str, torch.Tensor]:
    ids = {}
    for encoder in text_encoders(family, pipeline):
        tokenizer = getattr(pipeline, encoder.tokenizer)
        is_t5 = encoder.kind == "t5"
        ids[encoder.network] = tokenizer(
            ["", PROMPT] if is_guided else [PROMPT],
            padding="max_length",
            max_length=family.t5_length if is_t5 else tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
    return ids


@dataclass(frozen=True)
class _Networks:
    """The exported networks, each of which is open for as long as it is used."""

    paths: Mapping[str, Path]
    device: torch.device

    def open(self, name: str) -> Run:
        return open_network(self.paths[name], self.device)


def verify_loop(
    reference: LoopReference,
    specs: Mapping[str, NetworkSpec],
    paths: Mapping[str, Path],
    precision: Precision,
    device: torch.device = CPU,
) -> dict[str, Any]:
    """Run the same loop over the exported networks; returns the manifest's record of the result.

    Args:
        specs: by the networks' names in the family, as are `paths`.

    Raises:
        ExportError: the final latents or the picture are off by more than allowed.
    """
    networks = _Networks(paths, device)
    inputs = dict(reference.conditions) | _embeddings(reference, networks)
    latents = _denoised(reference, specs[reference.family.denoiser], networks, inputs)
    unscaled = latents.numpy() / reference.scaling_factor + reference.shift_factor
    decoder = networks.open("vae_decoder")
    (pixels,) = decoder({"latent_sample": unscaled.astype(np.float32)}, ["sample"])

    error = relative_error("the loop: its result", latents.numpy(), reference.latents)
    picture_error = float(np.abs(_to_unit(pixels) - reference.picture).mean())
    tolerance, picture_tolerance = TOLERANCE[precision], PICTURE_TOLERANCE[precision]
    # Written so that an error that is not a number is refused too.
    if not (error <= tolerance and picture_error <= picture_tolerance):
        raise ExportError(
            f"the loop over the {precision} networks differs from diffusers: latents by "
            f"{error:.2e} of their range (allowed {tolerance:.0e}), picture by "
            f"{255 * picture_error:.2f}/255 on average (allowed {255 * picture_tolerance:.0f}/255)"
        )
    return {
        "num_inference_steps": NUM_STEPS,
        "guidance_scale": GUIDANCE_SCALE,
        "error": error,
        "tolerance": tolerance,
        "picture_error": picture_error,
        "picture_tolerance": picture_tolerance,
    }


def _denoised(
    reference: LoopReference,
    spec: NetworkSpec,
    networks: _Networks,
    inputs: dict[str, NDArray[Any]],
) -> torch.Tensor:
    family, scheduler, latents = reference.family, reference.scheduler, reference.noise
    rows = 1 + reference.is_guided
    shape = InputShape(rows, *latents.shape[2:])
    zeros = {name: tensor.numpy() for name, tensor in spec.zeros(shape).items()}
    hints = _hints(reference, networks).repeat(rows, 1, 1, 1)
    denoiser = networks.open(family.denoiser)
    scheduler.set_timesteps(NUM_STEPS)
    for timestep in scheduler.timesteps:
        sample = torch.cat([latents.repeat(rows, 1, 1, 1), hints], dim=1).numpy()
        times = np.full(rows, float(timestep), np.float32)
        feed = zeros | inputs | {family.sample: sample, "timestep": times}
        (output,) = denoiser(feed, [family.output])
        prediction = torch.from_numpy(output)
        if reference.is_guided:
            unconditional, conditional = prediction.chunk(2)
            prediction = unconditional + GUIDANCE_SCALE * (conditional - unconditional)
        latents = scheduler.step(prediction, timestep, latents).prev_sample
    return latents


def _embeddings(reference: LoopReference, networks: _Networks) -> dict[str, Array]:
    """The denoiser's inputs that come from the text, of the exported text encoders."""
    family = reference.family
    clip: list[Array] = []
    pooled: list[Array] = []
    others: list[Array] = []
    for encoder in family.text_encoders:
        if encoder.network not in reference.token_ids:
            continue
        names = [encoder.hidden, *(["text_embeds"] if encoder.is_pooled else [])]
        ids = reference.token_ids[encoder.network].numpy()
        hidden, *rest = networks.open(encoder.network)({"input_ids": ids}, names)
        (others if encoder.kind == "t5" else clip).append(hidden)
        pooled += rest
    joined = np.concatenate(clip, axis=-1)
    joined = np.pad(joined, ((0, 0), (0, 0), (0, reference.text_width - joined.shape[-1])))
    if family.t5_length and not others:
        others = [np.zeros((len(joined), family.t5_length, reference.text_width), np.float32)]
    inputs = {"encoder_hidden_states": np.concatenate([joined, *others], axis=1)}
    if family.pooled_input is not None:
        inputs[family.pooled_input] = np.concatenate(pooled, axis=-1)
    if reference.is_guided and reference.is_negative_zero:
        for array in inputs.values():
            array[0] = 0
    return inputs


def _hints(reference: LoopReference, networks: _Networks) -> torch.Tensor:
    """(1, C, h, w) that an inpainting UNet sees besides the latents; no channels for others."""
    mask = reference.mask
    if mask is None:
        return reference.noise[:, :0]
    encoder = networks.open("vae_encoder")
    feed = {"sample": mask.masked_picture.numpy()}
    (parameters,) = encoder(feed, ["latent_parameters"])
    generator = torch.Generator().manual_seed(mask.seed)
    latents = DiagonalGaussianDistribution(torch.from_numpy(parameters)).sample(generator)
    return torch.cat([mask.mask, reference.scaling_factor * latents], dim=1)


def _to_unit(sample: Array) -> Array:
    return np.clip(sample / 2 + 0.5, 0, 1)
