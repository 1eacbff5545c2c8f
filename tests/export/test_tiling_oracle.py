"""A real VAE, tile by tile, beside its whole picture and beside diffusers' tiles."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from darkroom_engine.tiling import Array, decode_tiled, encode_tiled

TILE, OVERLAP = 16, 8
MEAN_BOUND = 14.0
"""Of 255; half as much again as was measured."""
ENCODE_BOUND = 0.1
"""Of the standard deviation; the same."""


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    """As Stable Diffusion's, but for its width; random, so that nothing is hidden by training."""
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        norm_num_groups=8,
    ).eval()


@pytest.fixture(scope="module")
def factor(vae: AutoencoderKL) -> int:
    return int(2 ** (len(vae.config.block_out_channels) - 1))


def decoder(vae: AutoencoderKL) -> Callable[[Array], Array]:
    @torch.no_grad()
    def decode(latents: Array) -> Array:
        return np.asarray(vae.decode(torch.tensor(latents)).sample)

    return decode


@contextmanager
def diffusers_tiling(vae: AutoencoderKL, factor: int) -> Iterator[None]:
    vae.enable_tiling()
    vae.tile_latent_min_size, vae.tile_sample_min_size = TILE, TILE * factor
    vae.tile_overlap_factor = OVERLAP / TILE
    yield
    vae.disable_tiling()


def error(made: Array, whole: Array) -> Array:
    """In levels of 255."""
    return np.abs(np.clip(made, -1, 1) - np.clip(whole, -1, 1)) * 127.5


@pytest.mark.parametrize(("height", "width"), list(product((24, 29), (40,))))
def test_tiles_are_as_close_to_the_whole_picture_as_those_of_diffusers(
    vae: AutoencoderKL, factor: int, height: int, width: int
) -> None:
    latents = np.random.default_rng(0).standard_normal((1, 4, height, width)).astype(np.float32)
    decode = decoder(vae)
    whole = decode(latents)
    ours = error(decode_tiled(decode, latents, factor, TILE, OVERLAP), whole)
    with diffusers_tiling(vae, factor):
        theirs = error(decode(latents), whole)

    assert ours.mean() <= min(theirs.mean(), MEAN_BOUND)
    assert ours.max() <= theirs.max() * 1.1


def test_what_fits_into_a_tile_is_the_same_to_the_bit(vae: AutoencoderKL, factor: int) -> None:
    latents = np.random.default_rng(0).standard_normal((2, 4, TILE, 9)).astype(np.float32)
    decode = decoder(vae)

    made = decode_tiled(decode, latents, factor, TILE, OVERLAP)
    assert np.array_equal(made, decode(latents))


def test_encoded_tiles_are_as_close_to_the_whole_picture_as_those_of_diffusers(
    vae: AutoencoderKL, factor: int
) -> None:
    @torch.no_grad()
    def encode(pixels: Array) -> Array:
        return np.asarray(vae.encode(torch.tensor(pixels)).latent_dist.parameters)

    size = (1, 3, 24 * factor, 40 * factor)
    pixels = np.random.default_rng(0).uniform(-1, 1, size).astype(np.float32)
    whole = encode(pixels)
    ours = np.abs(encode_tiled(encode, pixels, factor, TILE, OVERLAP) - whole)
    with diffusers_tiling(vae, factor):
        theirs = np.abs(encode(pixels) - whole)

    assert ours.mean() <= min(theirs.mean(), ENCODE_BOUND * whole.std())
