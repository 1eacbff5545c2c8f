"""What was asked for: a frozen `ImageRequest`, validated once, at the edge."""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from PIL import Image

from darkroom_engine.errors import InvalidRequest
from darkroom_engine.reader import Field, Latents, Reader
from darkroom_engine.schedule import TIMESTEP_SPACINGS

MAX_SEED = 2**63 - 1
OUTPUT_FORMATS = ("png", "jpeg", "webp", "b64_png", "latent")
PRIORITIES = (-10, 10)
MAX_CONDITIONED_SIZE = 16_384
MAX_CONTROLS = 8
MAX_LORAS = 8
MODES = ("text2img", "img2img", "inpaint")


@dataclass(frozen=True)
class Limits:
    """What one checkpoint on one server allows, and what it assumes where a field is left out."""

    samplers: tuple[str, ...]
    default_sampler: str
    default_width: int
    default_height: int
    default_num_inference_steps: int
    default_guidance_scale: float
    size_multiple: int
    min_size: int
    max_size: int
    max_num_inference_steps: int
    max_guidance_scale: float
    max_num_images_per_prompt: int
    max_clip_skip: int
    max_embeddings_multiples: int
    latent_channels: int = 4
    vae_scale_factor: int = 8
    modes: tuple[str, ...] = MODES
    size_fields: tuple[str, ...] = ()
    """The fields about sizes and looks that the denoiser is told, as SDXL's is."""
    controlnets: tuple[str, ...] = ()
    loras: tuple[str, ...] = ()
    variants: tuple[str, ...] = ()
    sizes: Sequence[tuple[tuple[int, int], tuple[int, int]]] = ()
    """Heights and widths, from and to, that go together in engines built for them; () is all."""


@dataclass(frozen=True)
class Control:
    """One ControlNet at work in a request."""

    name: str
    image: Image.Image = field(repr=False)
    scale: float
    start: float
    end: float
    """It works from the first to the second, as fractions of the steps."""


@dataclass(frozen=True)
class Start:
    """What an image request starts from, besides noise."""

    picture: Image.Image | None = field(repr=False)
    latents: Latents | None = field(repr=False)
    """(C, H / 8, W / 8), in place of a picture."""
    mask: Image.Image | None = field(repr=False)
    """White where there is something to be made; without one, everywhere."""
    strength: float


@dataclass(frozen=True)
class ImageRequest:
    """One request, complete and valid. Field names are diffusers' parameter names."""

    prompt: str
    negative_prompt: str | None
    """None if it was left out, which some checkpoints tell from an empty one."""
    num_inference_steps: int
    guidance_scale: float
    guidance_rescale: float
    """How far the guided prediction is brought back to the conditional one's contrast, 0 to 1."""
    guidance_start: float
    guidance_stop: float
    """Guidance is on from the first to the second, as fractions of the steps."""
    seed: int
    """Of the first picture; picture k uses seed + k."""
    width: int
    height: int
    """Pixels."""
    sampler: str
    eta: float | None
    """How much noise the steps of `ddim` and `tcd` add; None is the sampler's default."""
    timestep_spacing: str | None
    """None is the checkpoint's own."""
    clip_skip: int
    """Layers of the text encoder that are left out at its end."""
    max_embeddings_multiples: int
    """Chunks of the text encoder's length that a prompt may take."""
    num_images_per_prompt: int
    start: Start | None
    """None starts from noise alone."""
    denoising_start: float | None
    denoising_end: float | None
    """Only the steps between them are made, as fractions of the schedule; None is its end."""
    original_size: tuple[int, int]
    crops_coords_top_left: tuple[int, int]
    target_size: tuple[int, int]
    """Height and width, or top and left."""
    aesthetic_score: float
    negative_aesthetic_score: float
    controls: tuple[Control, ...]
    loras: tuple[tuple[str, float], ...]
    """Names and scales."""
    variant: str | None
    priority: int
    """Larger goes first."""
    timeout_ms: int | None
    """Counted from the arrival of the request; None waits for ever."""
    output_format: str

    def guided_steps(self, num_steps: int) -> range:
        """Of so many steps, counted from 0, those at which classifier-free guidance is on.

        The interval of Kynkaanniemi et al. 2024 (arXiv:2404.07724), in fractions as diffusers'
        guiders count them.
        """
        if self.guidance_scale <= 1:
            return range(0)
        # 0.7 of 10 steps is not to be 6 for its last decimal.
        first, last = (round(f * num_steps, 4) for f in (self.guidance_start, self.guidance_stop))
        return range(int(first), int(last))

    @classmethod
    def parse(cls, fields: Mapping[str, Field], limits: Limits) -> "ImageRequest":
        """Validate raw fields, text as UTF-8 bytes, and fill in what was left out.

        Raises:
            InvalidRequest: names the field, the value and the allowed range.
        """
        unknown = sorted(set(fields) - FIELDS)
        if unknown:
            raise InvalidRequest(
                unknown[0], f"no such field; there are {', '.join(sorted(FIELDS))}"
            )
        if "prompt" not in fields:
            raise InvalidRequest("prompt", "missing; an empty text is allowed")
        read = Reader(fields)
        num_images = read.integer("num_images_per_prompt", 1, 1, limits.max_num_images_per_prompt)
        last_seed = MAX_SEED - (num_images - 1)
        guidance_start = read.number("guidance_start", 0.0, 0.0, 1.0)
        start = _start(read, limits)
        width, height = _size(read, start, limits)
        for name in _SIZE_FIELDS:
            if name in fields and name.removeprefix("negative_") not in limits.size_fields:
                raise InvalidRequest(name, "this checkpoint is not told of it")
        return cls(
            prompt=read.text("prompt", ""),
            negative_prompt=(
                read.text("negative_prompt", "") if "negative_prompt" in fields else None
            ),
            num_inference_steps=read.integer(
                "num_inference_steps",
                limits.default_num_inference_steps,
                1,
                limits.max_num_inference_steps,
            ),
            guidance_scale=read.number(
                "guidance_scale", limits.default_guidance_scale, 0.0, limits.max_guidance_scale
            ),
            guidance_rescale=read.number("guidance_rescale", 0.0, 0.0, 1.0),
            guidance_start=guidance_start,
            guidance_stop=read.number("guidance_stop", 1.0, guidance_start, 1.0),
            # 32 bits: what the noise generator distinguishes, see noise.py.
            seed=read.integer("seed", secrets.randbits(32), 0, last_seed),
            width=width,
            height=height,
            sampler=read.choice("sampler", limits.default_sampler, limits.samplers),
            eta=read.number("eta", 0.0, 0.0, 1.0) if "eta" in fields else None,
            timestep_spacing=read.optional_choice("timestep_spacing", TIMESTEP_SPACINGS),
            clip_skip=read.integer("clip_skip", 0, 0, limits.max_clip_skip),
            max_embeddings_multiples=read.integer(
                "max_embeddings_multiples", 1, 1, limits.max_embeddings_multiples
            ),
            num_images_per_prompt=num_images,
            start=start,
            denoising_start=_denoising_start(read, start),
            denoising_end=read.optional_number("denoising_end", 0.0, 1.0),
            original_size=read.pair("original_size", (height, width), 1, MAX_CONDITIONED_SIZE),
            crops_coords_top_left=read.pair(
                "crops_coords_top_left", (0, 0), 0, MAX_CONDITIONED_SIZE
            ),
            target_size=read.pair("target_size", (height, width), 1, MAX_CONDITIONED_SIZE),
            aesthetic_score=read.number("aesthetic_score", 6.0, 0.0, 10.0),
            negative_aesthetic_score=read.number("negative_aesthetic_score", 2.5, 0.0, 10.0),
            controls=_controls(read, limits),
            loras=_loras(read, limits),
            variant=_variant(read, limits),
            priority=read.integer("priority", 0, *PRIORITIES),
            timeout_ms=(
                read.integer("timeout_ms", 0, 1, 2**31 - 1) if "timeout_ms" in fields else None
            ),
            output_format=read.choice("output_format", "png", OUTPUT_FORMATS),
        )


_START_FIELDS = {"image", "mask_image", "strength"}
_CONTROL_FIELDS = {
    "controlnet",
    "control_image",
    "controlnet_conditioning_scale",
    "control_guidance_start",
    "control_guidance_end",
}
_SIZE_FIELDS = (
    "original_size",
    "crops_coords_top_left",
    "target_size",
    "aesthetic_score",
    "negative_aesthetic_score",
)
FIELDS = (
    frozenset(ImageRequest.__dataclass_fields__) - {"start", "controls", "loras"}
    | _START_FIELDS
    | _CONTROL_FIELDS
    | {"lora", "lora_scale"}
)


def _start(read: Reader, limits: Limits) -> Start | None:
    if not read.has("image"):
        for name in ("mask_image", "strength"):
            if read.has(name):
                raise InvalidRequest(name, "needs a starting picture, image")
        if "text2img" not in limits.modes:
            raise InvalidRequest("image", f"missing; this checkpoint is for {_listed(limits)}")
        return None
    mode = "inpaint" if read.has("mask_image") else "img2img"
    if mode not in limits.modes:
        field = "mask_image" if "inpaint" in limits.modes else "image"
        problem = "missing" if field == "mask_image" else "not possible"
        raise InvalidRequest(field, f"{problem}; this checkpoint is for {_listed(limits)}")
    latents = read.latents("image", limits.latent_channels)
    return Start(
        picture=None if latents is not None else read.picture("image"),
        latents=latents,
        mask=read.picture("mask_image") if mode == "inpaint" else None,
        strength=read.number("strength", 0.8 if mode == "img2img" else 1.0, 0.0, 1.0),
    )


def _size(read: Reader, start: Start | None, limits: Limits) -> tuple[int, int]:
    """Width and height: what was asked for, else those of the starting picture."""
    width, height = limits.default_width, limits.default_height
    if start is not None and start.latents is not None:
        width, height = (n * limits.vae_scale_factor for n in start.latents.shape[:0:-1])
        for name, size in (("width", width), ("height", height)):
            if read.integer(name, size, 0, 2**31 - 1) != size:
                raise InvalidRequest(name, f"the latents of image are for {size}, allowed is that")
    elif start is not None and start.picture is not None:
        width = _size_like(read, "width", start.picture.width, limits)
        height = _size_like(read, "height", start.picture.height, limits)
    width = _checked_size(read, "width", width, limits)
    height = _checked_size(read, "height", height, limits)
    _check_together(width, height, limits)
    return width, height


def _size_like(read: Reader, name: str, pixels: int, limits: Limits) -> int:
    """The size for a starting picture of so many pixels, where the request says none."""
    size = pixels // limits.size_multiple * limits.size_multiple
    if not read.has(name) and not limits.min_size <= size <= limits.max_size:
        raise InvalidRequest(
            "image",
            f"its {name} is {pixels}, allowed are {limits.min_size} to {limits.max_size}; "
            f"{name} says to what size it is to be brought",
        )
    return size


def _checked_size(read: Reader, name: str, default: int, limits: Limits) -> int:
    value = read.integer(name, default, limits.min_size, limits.max_size)
    if value % limits.size_multiple:
        raise InvalidRequest(
            name,
            f"{value} is not a multiple of {limits.size_multiple}, allowed are the multiples "
            f"from {limits.min_size} to {limits.max_size}",
        )
    return value


def _check_together(width: int, height: int, limits: Limits) -> None:
    if limits.sizes and not any(
        low <= height <= high and left <= width <= right
        for (low, high), (left, right) in limits.sizes
    ):
        allowed = " or ".join(
            f"{left} to {right} with a height of {low} to {high}"
            for (low, high), (left, right) in limits.sizes
        )
        raise InvalidRequest("width", f"{width} with a height of {height}, allowed are {allowed}")


def _denoising_start(read: Reader, start: Start | None) -> float | None:
    if read.has("denoising_start") and start is None:
        raise InvalidRequest("denoising_start", "needs what was made before, image")
    return read.optional_number("denoising_start", 0.0, 1.0)


def _controls(read: Reader, limits: Limits) -> tuple[Control, ...]:
    names = read.choices("controlnet", limits.controlnets, MAX_CONTROLS)
    if not names:
        for name in sorted(_CONTROL_FIELDS):
            if read.has(name):
                raise InvalidRequest(name, "needs the names of ControlNets, controlnet")
        return ()
    count = len(names)
    pictures = read.pictures("control_image", count)
    scales = read.numbers("controlnet_conditioning_scale", 1.0, 0.0, 10.0, count)
    starts = read.numbers("control_guidance_start", 0.0, 0.0, 1.0, count)
    ends = read.numbers("control_guidance_end", 1.0, 0.0, 1.0, count)
    for start, end in zip(starts, ends, strict=True):
        if start >= end:
            raise InvalidRequest(
                "control_guidance_start",
                f"{start:g} is not before control_guidance_end, which is {end:g}",
            )
    return tuple(map(Control, names, pictures, scales, starts, ends))


def _loras(read: Reader, limits: Limits) -> tuple[tuple[str, float], ...]:
    names = read.choices("lora", limits.loras, MAX_LORAS)
    if not names and read.has("lora_scale"):
        raise InvalidRequest("lora_scale", "needs the names of adapters, lora")
    if len(set(names)) < len(names):
        raise InvalidRequest("lora", f"{', '.join(names)} names one twice, allowed is once")
    scales = read.numbers("lora_scale", 1.0, -10.0, 10.0, len(names))
    return tuple(zip(names, scales, strict=True))


def _variant(read: Reader, limits: Limits) -> str | None:
    return read.choice("variant", "", limits.variants) if read.has("variant") else None


def _listed(limits: Limits) -> str:
    return " and ".join(limits.modes)
