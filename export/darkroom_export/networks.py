"""What each network takes and gives: one record a network, one table a family."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

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


class InputShape(NamedTuple):
    """The dynamic sizes of one call."""

    batch: int
    height: int
    width: int
    """Of the latents."""
    chunks: int = 1
    """How many times the text encoder's length the prompt is long."""


@dataclass(frozen=True)
class NetworkSpec:
    """A network to export: its module, its tensors, and how far ONNX may be from PyTorch."""

    name: str
    module: nn.Module
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    example: Callable[[torch.Generator, InputShape], tuple[torch.Tensor, ...]]
    """Random inputs of the given shape."""
    tolerance: Mapping[Precision, float]
    """Largest error of each output, as a fraction of its largest value."""


_TOLERANCE = {Precision.FP32: 1e-4, Precision.FP16: 1e-2}


def network_specs(pipeline: Any) -> tuple[NetworkSpec, ...]:
    """The networks of a Stable Diffusion 1.x pipeline."""
    text_config, unet_config = pipeline.text_encoder.config, pipeline.unet.config
    channels = unet_config.in_channels
    factor = unet_size_factor(pipeline)
    height, width = f"{factor}*height", f"{factor}*width"
    length, hidden = text_config.max_position_embeddings, text_config.hidden_size
    vae_factor = vae_scale_factor(pipeline)

    def token_ids(generator: torch.Generator, shape: InputShape) -> tuple[torch.Tensor, ...]:
        size = (shape.batch, length)
        return (torch.randint(0, text_config.vocab_size, size, generator=generator),)

    def unet_inputs(generator: torch.Generator, shape: InputShape) -> tuple[torch.Tensor, ...]:
        return (
            *latents(generator, shape),
            torch.rand(shape.batch, generator=generator) * 999,
            torch.randn(shape.batch, shape.chunks * length, hidden, generator=generator),
        )

    def latents(generator: torch.Generator, shape: InputShape) -> tuple[torch.Tensor, ...]:
        size = (shape.batch, channels, shape.height, shape.width)
        return (torch.randn(size, generator=generator),)

    float32 = torch.float32
    num_layers = text_config.num_hidden_layers
    return (
        NetworkSpec(
            name="text_encoder",
            module=_TextEncoder(pipeline.text_encoder),
            inputs=(TensorSpec("input_ids", torch.int64, (length,)),),
            outputs=(
                TensorSpec("last_hidden_state", float32, (length, hidden)),
                TensorSpec("hidden_states", float32, (num_layers + 1, length, hidden)),
            ),
            example=token_ids,
            tolerance=_TOLERANCE,
        ),
        NetworkSpec(
            name="unet",
            module=_UNet(pipeline.unet),
            inputs=(
                TensorSpec("sample", float32, (channels, height, width)),
                TensorSpec("timestep", float32, ()),
                TensorSpec("encoder_hidden_states", float32, ("sequence", hidden)),
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
    """The last hidden state, and those of all layers through the final layer norm.

    Skipping the last n layers, as diffusers does, is taking layer -(n + 1) of the second.
    """

    def __init__(self, text_encoder: Any) -> None:
        super().__init__()
        self.text_encoder: Any = text_encoder

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        output = self.text_encoder(input_ids, output_hidden_states=True)
        # transformers 5 gives up the layer between the two.
        inner = getattr(self.text_encoder, "text_model", self.text_encoder)
        layers = [inner.final_layer_norm(hidden) for hidden in output.hidden_states]
        return output.last_hidden_state.float(), torch.stack(layers, dim=1).float()


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
