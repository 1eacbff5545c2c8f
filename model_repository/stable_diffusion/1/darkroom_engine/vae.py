"""The VAE: pictures to latents and back."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from darkroom_engine.errors import NetworkFailed
from darkroom_engine.manifest import VAE_DECODER, VAE_ENCODER, Manifest
from darkroom_engine.networks import Shape
from darkroom_engine.steady import SteadyNetworks
from darkroom_engine.tiling import Run, decode_tiled, encode_tiled

Array = NDArray[np.float32]

_LOG_VARIANCES = (-30.0, 20.0)
"""Between these diffusers keeps what an encoder says."""


@dataclass(frozen=True)
class Posterior:
    """A picture's latents as the encoder sees them, in the scale of the denoising loop."""

    mean: Array
    std: Array
    """(C, h, w) both."""

    def draw(self, noise: Array) -> Array:
        """Latents drawn from it with unit noise (C, h, w)."""
        latents: Array = self.mean + self.std * noise
        return latents


class Vae:
    """Decodes and encodes by the networks `vae_decoder` and `vae_encoder`."""

    def __init__(
        self, manifest: Manifest, networks: SteadyNetworks, tile_size: int, tile_overlap: int
    ) -> None:
        """Take pictures with a side above `tile_size` pixels in tiles; 0 takes all in one piece.

        Raises:
            ValueError: `tile_size` is less than a latent.
        """
        self.scale_factor = factor = manifest.vae_scale_factor
        """Pixels per latent."""
        if 0 < tile_size < factor:
            raise ValueError(
                f"vae_tile_size: {tile_size} is below {factor}, allowed are 0 and more"
            )
        self._tile, self._overlap = tile_size // factor, tile_overlap // factor
        self._networks = networks
        self._scaling = np.float32(manifest.vae_scaling_factor)
        self._shift = np.float32(manifest.vae_shift_factor)
        self._has_encoder = manifest.has_encoder

    def decode(self, latents: Array) -> Array:
        """Latents (B, C, h, w) of the denoising loop to pixels (B, 3, 8h, 8w) in [-1, 1]."""
        unscaled = latents / self._scaling + self._shift
        return self._tiled(decode_tiled, self._decode, unscaled)

    def encode(self, pixels: Array) -> Posterior:
        """Pixels (3, 8h, 8w) in [-1, 1] to latents (C, h, w)."""
        parameters = self._tiled(encode_tiled, self._encode, pixels[None])[0]
        if not np.isfinite(parameters).all():
            raise NetworkFailed(VAE_ENCODER, "output is not finite")
        mean, log_variance = np.split(parameters, 2)
        std = np.exp(0.5 * np.clip(log_variance, *_LOG_VARIANCES))
        return Posterior((mean - self._shift) * self._scaling, std * self._scaling)

    def rehearse(self, shape: Shape, timeout_s: float) -> None:
        """Make the networks' first calls.

        Raises:
            NetworkFailed: one of them fails, or makes something of another shape.
        """
        channels, height, width = shape
        pixel_shape = (1, 3, height * self.scale_factor, width * self.scale_factor)
        calls = [(VAE_DECODER, "latent_sample", "sample", (1, *shape), pixel_shape)]
        if self._has_encoder:
            parameters_shape = (1, 2 * channels, height, width)
            call = (VAE_ENCODER, "sample", "latent_parameters", pixel_shape, parameters_shape)
            calls.append(call)
        for network, name, output, given, expected in calls:
            inputs = {name: np.zeros(given, np.float32)}
            (made,) = self._networks.first_run(network, inputs, [output], timeout_s)
            if made.shape != expected:
                raise NetworkFailed(network, f"made {made.shape}, expected {expected}")

    def _tiled(self, run_tiled: Callable[..., Array], run: Run, whole: Array) -> Array:
        if not self._tile:
            return run(whole)
        return run_tiled(run, whole, self.scale_factor, self._tile, self._overlap)

    def _decode(self, latents: Array) -> Array:
        made: Array = self._networks.run(VAE_DECODER, {"latent_sample": latents}, ["sample"])[0]
        return made

    def _encode(self, pixels: Array) -> Array:
        inputs = {"sample": pixels}
        made: Array = self._networks.run(VAE_ENCODER, inputs, ["latent_parameters"])[0]
        return made
