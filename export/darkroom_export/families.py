"""What the families of checkpoints differ in: one record a family."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple


@dataclass(frozen=True)
class TextEncoder:
    """One of a family's text encoders, as diffusers names it in a pipeline."""

    network: str
    tokenizer: str
    kind: str
    """clip, or t5, which has neither layers to skip nor a pooled output."""
    hidden: str
    """The output that conditions the denoiser."""
    is_pooled: bool = False


@dataclass(frozen=True)
class Family:
    """How a family's networks fit together, and what its pictures are asked for with."""

    text_encoders: tuple[TextEncoder, ...]
    """In the order in which their embeddings are joined."""
    denoiser: str
    sample: str
    output: str
    pooled_input: str | None
    time_ids: tuple[str, ...]
    num_inference_steps: int
    guidance_scale: float
    sampler: str
    samplers: tuple[str, ...]
    """The engine's, for the family's noise schedule."""
    max_embeddings_multiples: int
    t5_length: int = 0
    """How many tokens of T5, or zeros in their place, follow those of the CLIP encoders."""


_SAMPLERS = (
    *("unipc", "unipc_karras", "dpmpp_2m", "dpmpp_2m_karras"),
    *("dpmpp_2m_sde", "dpmpp_2m_sde_karras", "dpmpp_sde", "dpmpp_sde_karras"),
    *("euler", "euler_ancestral", "ddim", "lcm", "tcd"),
)
_SD1 = Family(
    text_encoders=(TextEncoder("text_encoder", "tokenizer", "clip", "last_hidden_state"),),
    denoiser="unet",
    sample="sample",
    output="out_sample",
    pooled_input=None,
    time_ids=(),
    num_inference_steps=25,
    guidance_scale=7.5,
    sampler="unipc",
    samplers=_SAMPLERS,
    max_embeddings_multiples=4,
)
_BIG_CLIP = TextEncoder(
    "text_encoder_2", "tokenizer_2", "clip", "penultimate_hidden_state", is_pooled=True
)
_SDXL = replace(
    _SD1,
    text_encoders=(
        TextEncoder("text_encoder", "tokenizer", "clip", "penultimate_hidden_state"),
        _BIG_CLIP,
    ),
    pooled_input="text_embeds",
    time_ids=("original_size", "crops_coords_top_left", "target_size"),
    guidance_scale=6.0,
)
_SDXL_REFINER = replace(
    _SDXL,
    text_encoders=(_BIG_CLIP,),
    time_ids=("original_size", "crops_coords_top_left", "aesthetic_score"),
)
_SD3 = Family(
    text_encoders=(
        TextEncoder(
            "text_encoder", "tokenizer", "clip", "penultimate_hidden_state", is_pooled=True
        ),
        _BIG_CLIP,
        TextEncoder("text_encoder_3", "tokenizer_3", "t5", "last_hidden_state"),
    ),
    denoiser="transformer",
    sample="hidden_states",
    output="out_hidden_states",
    pooled_input="pooled_projections",
    time_ids=(),
    num_inference_steps=28,
    guidance_scale=7.0,
    sampler="euler",
    samplers=("euler", "unipc", "dpmpp_2m"),
    # Attention over text and picture is one: a text written twice would weigh more.
    max_embeddings_multiples=1,
    t5_length=256,
)

FAMILIES: Mapping[str, Family] = {
    "sd1": _SD1,
    "sd2": _SD1,
    "sdxl": _SDXL,
    "sdxl-refiner": _SDXL_REFINER,
    "sd3": _SD3,
}

TIME_ID_SIZES = {
    "original_size": 2,
    "crops_coords_top_left": 2,
    "target_size": 2,
    "aesthetic_score": 1,
}


def text_encoders(family: Family, pipeline: Any) -> tuple[TextEncoder, ...]:
    """Those that the checkpoint has: Stable Diffusion 3 may come without T5."""
    return tuple(
        encoder
        for encoder in family.text_encoders
        if getattr(pipeline, encoder.network) is not None
    )


def vae_scale_factor(pipeline: Any) -> int:
    """Pixels per latent."""
    return int(2 ** (len(pipeline.vae.config.block_out_channels) - 1))


def size_factor(pipeline: Any, family: Family) -> int:
    """Latent height and width must be multiples of this for the denoiser's halvings to come out."""
    if family.denoiser == "transformer":
        return int(pipeline.transformer.config.patch_size)
    return int(2 ** (len(pipeline.unet.config.block_out_channels) - 1))


class SizeLimits(NamedTuple):
    """Of the sides of a checkpoint's pictures, in pixels."""

    default: int
    multiple: int
    min: int
    max: int


def size_limits(pipeline: Any, family: Family) -> SizeLimits:
    """What its pictures measure if nobody says otherwise, and what they may."""
    config = getattr(pipeline, family.denoiser).config
    multiple = vae_scale_factor(pipeline) * size_factor(pipeline, family)
    default = config.sample_size * vae_scale_factor(pipeline)
    # Positions beyond were never learnt.
    largest = config.get("pos_embed_max_size") or 2 * config.sample_size
    return SizeLimits(
        default=default,
        multiple=multiple,
        min=2 * multiple if 2 * multiple <= 128 else multiple,
        max=min(2 * default, largest * multiple),
    )
