"""What each network takes and gives: one record a network, one table a family."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from darkroom_export.precision import Precision

MAX_BATCH_SIZE = 63
"""diffusers' upsampling switches code at 64, and an exported graph holds one of the two only."""


@dataclass(frozen=True)
class TensorSpec:
    """One input or output, without its batch dimension; a text is a dynamic dimension's name.

    A dynamic dimension `"8*height"` is a multiple of 8.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class NetworkSpec:
    """A network to export: its module, its tensors, and how far ONNX may be from PyTorch."""

    name: str
    module: nn.Module
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    example: Callable[[torch.Generator, int, int, int], tuple[torch.Tensor, ...]]
    """(generator, batch, height, width) to random inputs; height and width are of the latents."""
    tolerance: Mapping[Precision, float]
    """Largest error, as a fraction of the largest output."""


_TOLERANCE = {Precision.FP32: 1e-4, Precision.FP16: 1e-2}


def network_specs(pipeline: Any) -> tuple[NetworkSpec, ...]:
    """The networks of a Stable Diffusion 1.x pipeline."""
    text_config, unet_config = pipeline.text_encoder.config, pipeline.unet.config
    channels = unet_config.in_channels
    factor = unet_size_factor(pipeline)
    height, width = f"{factor}*height", f"{factor}*width"
    length, hidden = text_config.max_position_embeddings, text_config.hidden_size
    vae_factor = vae_scale_factor(pipeline)

    def token_ids(generator: torch.Generator, batch: int, *_: int) -> tuple[torch.Tensor, ...]:
        shape = (batch, length)
        return (torch.randint(0, text_config.vocab_size, shape, generator=generator),)

    def unet_inputs(
        generator: torch.Generator, batch: int, height: int, width: int
    ) -> tuple[torch.Tensor, ...]:
        return (
            torch.randn(batch, channels, height, width, generator=generator),
            torch.rand(batch, generator=generator) * 999,
            torch.randn(batch, length, hidden, generator=generator),
        )

    def latents(
        generator: torch.Generator, batch: int, height: int, width: int
    ) -> tuple[torch.Tensor, ...]:
        return (torch.randn(batch, channels, height, width, generator=generator),)

    float32 = torch.float32
    return (
        NetworkSpec(
            name="text_encoder",
            module=_TextEncoder(pipeline.text_encoder),
            inputs=(TensorSpec("input_ids", torch.int64, (length,)),),
            outputs=(TensorSpec("last_hidden_state", float32, (length, hidden)),),
            example=token_ids,
            tolerance=_TOLERANCE,
        ),
        NetworkSpec(
            name="unet",
            module=_UNet(pipeline.unet),
            inputs=(
                TensorSpec("sample", float32, (channels, height, width)),
                TensorSpec("timestep", float32, ()),
                TensorSpec("encoder_hidden_states", float32, (length, hidden)),
            ),
            outputs=(TensorSpec("out_sample", float32, (channels, height, width)),),
            example=unet_inputs,
            tolerance=_TOLERANCE,
        ),
        NetworkSpec(
            name="vae_decoder",
            module=_VaeDecoder(pipeline.vae),
            inputs=(TensorSpec("latent_sample", float32, (channels, "height", "width")),),
            outputs=(
                TensorSpec("sample", float32, (3, f"{vae_factor}*height", f"{vae_factor}*width")),
            ),
            example=latents,
            tolerance=_TOLERANCE,
        ),
    )


def vae_scale_factor(pipeline: Any) -> int:
    """Pixels per latent."""
    return int(2 ** (len(pipeline.vae.config.block_out_channels) - 1))


def unet_size_factor(pipeline: Any) -> int:
    """Latent height and width must be multiples of this for the UNet's halvings to come out."""
    return int(2 ** (len(pipeline.unet.config.block_out_channels) - 1))


class _TextEncoder(nn.Module):
    def __init__(self, text_encoder: nn.Module) -> None:
        super().__init__()
        self.text_encoder = text_encoder

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.text_encoder(input_ids)[0]
        return hidden.float()


class _UNet(nn.Module):
    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet: Any = unet

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor
    ) -> torch.Tensor:
        dtype = self.unet.dtype
        output: torch.Tensor = self.unet(
            sample.to(dtype), timestep, encoder_hidden_states.to(dtype), return_dict=False
        )[0]
        return output.float()


class _VaeDecoder(nn.Module):
    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae: Any = vae

    def forward(self, latent_sample: torch.Tensor) -> torch.Tensor:
        latents = latent_sample.to(self.vae.dtype)
        sample: torch.Tensor = self.vae.decode(latents, return_dict=False)[0]
        return sample.float()
