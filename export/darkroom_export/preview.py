"""A linear map from latents to colours: a picture can be looked at while it is made.

The decoder's colours are nearly linear in the latents, so that a map of a few numbers, fitted once
per checkpoint, shows in microseconds what decoding would show in a second.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from darkroom_export.errors import ExportError

NUM_FITTED = 24
NUM_HELD_OUT = 8
LATENT_SIZE = 12
"""Of the pictures, in latents: enough for what is at a picture's edge to be a small part of it."""


def fit_preview(vae: Any, scale_factor: int, seed: int) -> dict[str, Any]:
    """Fit colours = latents @ matrix + bias to synthetic pictures; returns the manifest's record.

    The latents are those of the denoising loop, hence shifted and scaled; a latent's colours, in
    [-1, 1], are the mean of the `scale_factor`^2 pixels that the decoder makes of it. `r2` is
    measured on pictures that were not fitted: the part of the colours' variance that the map
    explains.

    Raises:
        ExportError: the VAE makes something that is not a finite number.
    """
    generator = torch.Generator().manual_seed(seed)
    size = LATENT_SIZE * scale_factor
    pairs = [
        _latents_and_colours(vae, scale_factor, synthetic_picture(index, size, generator))
        for index in range(NUM_FITTED + NUM_HELD_OUT)
    ]
    latents, colours = _joined(pairs[:NUM_FITTED])
    weights = np.linalg.lstsq(latents, colours, rcond=None)[0]
    latents, colours = _joined(pairs[NUM_FITTED:])
    return {
        "matrix": weights[:-1].tolist(),
        "bias": weights[-1].tolist(),
        "r2": _r2(latents @ weights, colours),
    }


def synthetic_picture(index: int, size: int, generator: torch.Generator) -> torch.Tensor:
    """(1, 3, size, size) in [-1, 1]: a smooth field of colours or, at odd indices, some shapes."""

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator)

    def colours(height: int, width: int) -> torch.Tensor:
        # Beyond what can be shown, so that full colours are not rare.
        return 3 * uniform(1, 3, height, width) - 1.5

    if index % 2 == 0:
        coarse = colours(2 + index % 5, 2 + index % 5)
        return functional.interpolate(coarse, size, mode="bicubic").clamp(-1, 1)
    picture = colours(1, 1).repeat(1, 1, size, size)
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    for number in range(5):
        center_y, center_x = (size * uniform(2)).tolist()
        half_height, half_width = (1 + size / 3 * uniform(2)).tolist()
        dy, dx = ((y - center_y) / half_height).abs(), ((x - center_x) / half_width).abs()
        is_inside = dy**2 + dx**2 < 1 if number % 2 == 0 else torch.maximum(dy, dx) < 1
        picture = torch.where(is_inside, colours(1, 1), picture)
    return picture.clamp(-1, 1)


def _latents_and_colours(
    vae: Any, scale_factor: int, picture: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(1, C, h, w) latents as the denoiser sees them, and (1, 3, h, w) colours of theirs."""
    with torch.no_grad():
        latents = vae.encode(picture.to(next(vae.parameters()).device)).latent_dist.mode()
        pixels = vae.decode(latents, return_dict=False)[0].cpu()
    latents = latents.cpu()
    for side, values in (("encoder", latents), ("decoder", pixels)):
        if not values.isfinite().all():
            raise ExportError(f"vae: the {side}'s output is not finite, the weights are broken")
    # What a decoder makes beyond black and white, nobody sees.
    colours = functional.avg_pool2d(pixels.clamp(-1, 1), scale_factor)
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    return (latents - shift) * vae.config.scaling_factor, colours


def _joined(
    pairs: list[tuple[torch.Tensor, torch.Tensor]],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(N, C + 1) latents, each with a 1 for the constant, and (N, 3) colours."""
    latents, colours = (
        torch.cat([tensor.movedim(1, -1).flatten(0, 2) for tensor in tensors]).double().numpy()
        for tensors in zip(*pairs, strict=True)
    )
    return np.pad(latents, ((0, 0), (0, 1)), constant_values=1.0), colours


def _r2(fitted: NDArray[np.float64], colours: NDArray[np.float64]) -> float:
    """1 - the rest's share of the variance; 0 where there is no variance to explain."""
    variance = float(((colours - colours.mean(axis=0)) ** 2).sum())
    rest = float(((colours - fitted) ** 2).sum())
    return 1 - rest / variance if variance > 0 else 0.0
