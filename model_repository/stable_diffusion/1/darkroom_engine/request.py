"""What was asked for: a frozen `ImageRequest`, validated once, at the edge."""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO

from PIL import Image, UnidentifiedImageError

from darkroom_engine.errors import InvalidRequest
from darkroom_engine.schedule import TIMESTEP_SPACINGS

MAX_SEED = 2**63 - 1
MAX_PROMPT_BYTES = 16_384
OUTPUT_FORMATS = ("png", "jpeg", "webp", "b64_png")
MAX_EMBEDDINGS_MULTIPLES = 4
PRIORITIES = (-10, 10)

Field = bytes | int | float


@dataclass(frozen=True)
class Limits:
    """What one checkpoint on one server allows, and what it assumes where a field is left out."""

    samplers: tuple[str, ...]
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


@dataclass(frozen=True)
class ImageRequest:
    """One request, complete and valid. Field names are diffusers' parameter names."""

    prompt: str
    negative_prompt: str
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
    priority: int
    """Larger goes first."""
    timeout_ms: int | None
    """Counted from the arrival of the request; None waits for ever."""
    output_format: str

    @cached_property
    def guided_steps(self) -> range:
        """The steps, counted from 0, at which classifier-free guidance is on.

        The interval of Kynkaanniemi et al. 2024 (arXiv:2404.07724), in fractions as diffusers'
        guiders count them.
        """
        if self.guidance_scale <= 1:
            return range(0)
        # The fractions arrive as float32: 0.7 of 10 steps is not to be 6 for its last decimal.
        count = self.num_inference_steps
        first, last = (round(f * count, 4) for f in (self.guidance_start, self.guidance_stop))
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
        read = _Reader(fields)
        _refuse_pictures(read)
        num_images = read.integer("num_images_per_prompt", 1, 1, limits.max_num_images_per_prompt)
        last_seed = MAX_SEED - (num_images - 1)
        guidance_start = read.number("guidance_start", 0.0, 0.0, 1.0)
        return cls(
            prompt=read.text("prompt", ""),
            negative_prompt=read.text("negative_prompt", ""),
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
            width=read.size("width", limits.default_width, limits),
            height=read.size("height", limits.default_height, limits),
            sampler=read.choice("sampler", limits.samplers[0], limits.samplers),
            eta=read.number("eta", 0.0, 0.0, 1.0) if "eta" in fields else None,
            timestep_spacing=(
                read.choice("timestep_spacing", "", TIMESTEP_SPACINGS)
                if "timestep_spacing" in fields
                else None
            ),
            clip_skip=read.integer("clip_skip", 0, 0, limits.max_clip_skip),
            max_embeddings_multiples=read.integer(
                "max_embeddings_multiples", 1, 1, MAX_EMBEDDINGS_MULTIPLES
            ),
            num_images_per_prompt=num_images,
            priority=read.integer("priority", 0, *PRIORITIES),
            timeout_ms=(
                read.integer("timeout_ms", 0, 1, 2**31 - 1) if "timeout_ms" in fields else None
            ),
            output_format=read.choice("output_format", "png", OUTPUT_FORMATS),
        )


FIELDS = frozenset(ImageRequest.__dataclass_fields__) | {"image", "mask_image", "strength"}


class _Reader:
    """Reads typed, range-checked values out of raw fields."""

    def __init__(self, fields: Mapping[str, Field]) -> None:
        self._fields = fields

    def integer(self, name: str, default: int, low: int, high: int) -> int:
        value = self._fields.get(name, default)
        if not isinstance(value, int):
            raise InvalidRequest(name, f"{value!r} is not a whole number")
        if not low <= value <= high:
            raise InvalidRequest(name, f"{value} is out of range, allowed are {low} to {high}")
        return value

    def number(self, name: str, default: float, low: float, high: float) -> float:
        value = self._fields.get(name, default)
        if not isinstance(value, int | float):
            raise InvalidRequest(name, f"{value!r} is not a number")
        # A NaN fails every comparison, so that it is refused as well.
        if not low <= value <= high:
            raise InvalidRequest(
                name, f"{value:g} is out of range, allowed are {low:g} to {high:g}"
            )
        return float(value)

    def size(self, name: str, default: int, limits: Limits) -> int:
        value = self.integer(name, default, limits.min_size, limits.max_size)
        if value % limits.size_multiple:
            raise InvalidRequest(
                name,
                f"{value} is not a multiple of {limits.size_multiple}, allowed are the multiples "
                f"from {limits.min_size} to {limits.max_size}",
            )
        return value

    def text(self, name: str, default: str) -> str:
        raw = self._fields.get(name)
        if raw is None:
            return default
        if not isinstance(raw, bytes):
            raise InvalidRequest(name, f"{raw!r} is not text")
        if len(raw) > MAX_PROMPT_BYTES:
            raise InvalidRequest(
                name, f"{len(raw)} bytes is too long, allowed are 0 to {MAX_PROMPT_BYTES}"
            )
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise InvalidRequest(
                name, f"not UTF-8 text: byte 0x{raw[error.start]:02x} at position {error.start}"
            ) from None

    def choice(self, name: str, default: str, choices: tuple[str, ...]) -> str:
        value = self.text(name, default)
        if value not in choices:
            raise InvalidRequest(name, f"{value!r} does not exist, there are {', '.join(choices)}")
        return value

    def picture(self, name: str) -> Image.Image | None:
        raw = self._fields.get(name)
        if raw is None:
            return None
        if not isinstance(raw, bytes):
            raise InvalidRequest(name, "not the bytes of a picture")
        try:
            picture = Image.open(BytesIO(raw), formats=("PNG", "JPEG", "WEBP"))
            picture.load()
        except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError):
            raise InvalidRequest(
                name, f"{len(raw)} bytes that are no readable picture, allowed are PNG, JPEG, WebP"
            ) from None
        return picture


def _refuse_pictures(read: _Reader) -> None:
    """Starting pictures need a VAE encoder, and no repository has one yet."""
    strength = read.number("strength", 0.8, 0.0, 1.0)
    for name in ("image", "mask_image"):
        if read.picture(name) is not None:
            raise InvalidRequest(
                name,
                f"a starting picture (strength {strength:g}) needs a vae_encoder network, "
                "which this repository does not have",
            )
