"""Pixels to encoded pictures that carry their provenance, and pictures to pixels."""

import base64
import json
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from darkroom_engine.request import ImageRequest

_RARE: dict[str, Any] = {
    "guidance_rescale": 0.0,
    "guidance_start": 0.0,
    "guidance_stop": 1.0,
    "eta": None,
    "timestep_spacing": None,
    "clip_skip": 0,
    "max_embeddings_multiples": 1,
    "denoising_start": None,
    "denoising_end": None,
    "variant": None,
}
"""Fields that the provenance names only where they differ from these."""


def to_unit(picture: Image.Image, size: tuple[int, int]) -> NDArray[np.float32]:
    """A picture at (width, height) as (3, H, W) in 0 to 1, as diffusers brings it to a size."""
    return _unit(picture.resize(size, Image.Resampling.LANCZOS).convert("RGB"))


def to_mask(picture: Image.Image, size: tuple[int, int]) -> NDArray[np.float32]:
    """(1, H, W), 1 where the picture is bright and 0 elsewhere."""
    grey = _unit(picture.resize(size, Image.Resampling.LANCZOS).convert("L"))
    return (grey >= 0.5).astype(np.float32)


def _unit(picture: Image.Image) -> NDArray[np.float32]:
    levels = np.asarray(picture, np.float32).reshape(picture.height, picture.width, -1)
    return np.ascontiguousarray(levels.transpose(2, 0, 1)) / np.float32(255)


def to_uint8(pixels: NDArray[np.float32]) -> NDArray[np.uint8]:
    """(3, H, W) in [-1, 1], clipped, to (H, W, 3) in 0 to 255."""
    scaled = np.clip(pixels / 2 + 0.5, 0, 1) * 255
    return scaled.round().astype(np.uint8).transpose(1, 2, 0)


def encode(pixels: NDArray[np.uint8], output_format: str, provenance: dict[str, Any]) -> bytes:
    """(H, W, 3) to the bytes of a file; only PNG carries the provenance."""
    picture = Image.fromarray(pixels)
    buffer = BytesIO()
    if output_format in ("png", "b64_png"):
        chunks = PngInfo()
        # The form that the common browsers of generated pictures read.
        chunks.add_text("parameters", _infotext(provenance))
        chunks.add_text("darkroom", json.dumps(provenance, ensure_ascii=False))
        picture.save(buffer, "PNG", pnginfo=chunks)
    else:
        picture.save(buffer, output_format.upper(), quality=95)
    encoded = buffer.getvalue()
    return base64.b64encode(encoded) if output_format == "b64_png" else encoded


def preview(
    latents: NDArray[np.float32], matrix: NDArray[np.float32], bias: NDArray[np.float32]
) -> bytes:
    """Latents (C, H, W) to a JPEG of W x H pixels, by a linear map (C, 3) fitted to the VAE."""
    pixels = np.einsum("chw,cr->rhw", latents, matrix) + bias[:, None, None]
    buffer = BytesIO()
    Image.fromarray(to_uint8(np.nan_to_num(pixels))).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def provenance(request: ImageRequest, seed: int, model: str, engine: str) -> dict[str, Any]:
    """All that it takes to make the picture again."""
    rare = {name: getattr(request, name) for name in _RARE}
    return {
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt or "",
        "num_inference_steps": request.num_inference_steps,
        "sampler": request.sampler,
        "guidance_scale": request.guidance_scale,
        "seed": seed,
        "width": request.width,
        "height": request.height,
        **{name: value for name, value in rare.items() if value != _RARE[name]},
        **_inputs(request),
        "model": model,
        "engine": engine,
    }


def encode_latents(latents: NDArray[np.float32]) -> bytes:
    """(C, h, w) as the bytes of a .npy file, which a request may take as its `image`."""
    buffer = BytesIO()
    np.save(buffer, latents, allow_pickle=False)
    return buffer.getvalue()


def _inputs(request: ImageRequest) -> dict[str, Any]:
    """What a picture was made with besides text and numbers; not the pictures themselves."""
    inputs: dict[str, Any] = {}
    if request.start is not None:
        inputs["mode"] = "img2img" if request.start.mask is None else "inpaint"
        inputs["strength"] = request.start.strength
    if request.controls:
        inputs["controlnets"] = {control.name: control.scale for control in request.controls}
    if request.loras:
        inputs["loras"] = dict(request.loras)
    return inputs


def _infotext(facts: dict[str, Any]) -> str:
    lines = [facts["prompt"]]
    if facts["negative_prompt"]:
        lines.append(f"Negative prompt: {facts['negative_prompt']}")
    lines.append(
        f"Steps: {facts['num_inference_steps']}, Sampler: {facts['sampler']}, "
        f"CFG scale: {facts['guidance_scale']:g}, Seed: {facts['seed']}, "
        f"Size: {facts['width']}x{facts['height']}, "
        f"Model: {facts['model']}, Model hash: {facts['engine']}"
    )
    return "\n".join(lines)
