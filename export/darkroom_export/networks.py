"""What each network takes and gives: one record a network, one table a family."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from darkroom_export.device import CPU
from darkroom_export.errors import ExportError
from darkroom_export.families import (
    TIME_ID_SIZES,
    Family,
    TextEncoder,
    size_factor,
    text_encoders,
    vae_scale_factor,
)
from darkroom_export.precision import Precision

MAX_BATCH_SIZE = 63
"""diffusers' upsampling switches code at 64, and an exported graph holds one of the two only."""

RandomTensor = Callable[[tuple[int, ...], torch.Generator], torch.Tensor]


def normal(size: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.randn(size, generator=generator)


def uniform(high: float) -> RandomTensor:
    return lambda size, generator: high * torch.rand(size, generator=generator)


def integers(high: int) -> RandomTensor:
    return lambda size, generator: torch.randint(0, high, size, generator=generator)


@dataclass(frozen=True)
class Residual:
    """A feature map that ControlNets add to the UNet's own."""

    name: str
    channels: int
    divisor: int
    """Its height and width are those of the latents, divided by this."""


@dataclass(frozen=True)
class TensorSpec:
    """One input or output, without its batch dimension; a text is a dynamic dimension's name.

    A dynamic dimension `"8*height"` is a multiple of 8.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int | str, ...]
    random: RandomTensor = normal
    """Makes an input of the given size to compare PyTorch and ONNX with."""
    optional: Mapping[str, object] | None = None
    """For an input that may be left out, and then is zeros: what the zeros' shape follows from."""


class InputShape(NamedTuple):
    """The dynamic sizes of one call."""

    batch: int
    height: int
    width: int
    """Of the latents."""
    sequence: int = 77
    """Tokens of the prompt."""


@dataclass(frozen=True)
class NetworkSpec:
    """A network to export: its module, its tensors, and how far ONNX may be from PyTorch.

    The module takes the inputs in their order and gives a tensor, or a tuple of them.
    """

    name: str
    module: nn.Module
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    tolerance: Mapping[Precision, float]
    """Largest error of each output, as a fraction of its largest value."""
    grid: int = 1
    """How many latents the dynamic dimensions `height` and `width` count as one."""
    float32_parts: tuple[str, ...] = ()
    """Names of submodules that compute in float32 in any precision; "" is all of the module."""

    def example(self, generator: torch.Generator, shape: InputShape) -> tuple[torch.Tensor, ...]:
        """Random inputs of the given shape."""
        return tuple(tensor.random(self.size(tensor, shape), generator) for tensor in self.inputs)

    def zeros(self, shape: InputShape) -> dict[str, torch.Tensor]:
        """The inputs that may be left out."""
        return {
            tensor.name: torch.zeros(self.size(tensor, shape), dtype=tensor.dtype)
            for tensor in self.inputs
            if tensor.optional is not None
        }

    def size(self, tensor: TensorSpec, shape: InputShape) -> tuple[int, ...]:
        """What `tensor` measures in a call of the given shape."""
        named = {
            "height": shape.height // self.grid,
            "width": shape.width // self.grid,
            "sequence": shape.sequence,
        }

        def resolved(size: int | str) -> int:
            if isinstance(size, int):
                return size
            factor, _, name = size.rpartition("*")
            return int(factor or 1) * named[name]

        return shape.batch, *map(resolved, tensor.shape)

    def precision(self, precision: Precision) -> Precision:
        """What the network computes in where `precision` is asked for."""
        return Precision.FP32 if "" in self.float32_parts else precision

    def convert(self, precision: Precision) -> None:
        """Convert the module's weights in place, and bring them to the CPU, where it is traced."""
        self.cast(precision)
        # At last, when there are fewer bytes to move.
        self.module.to(CPU)

    def cast(self, precision: Precision) -> None:
        """Convert the module's weights in place, where they are."""
        self.module.to(self.precision(precision).dtype)
        for name, part in self.module.named_modules():
            if name.rpartition(".")[2] in self.float32_parts:
                part.to(torch.float32)


_FLOAT32 = torch.float32
# bf16 has three bits of precision less than fp16.
TOLERANCE = {Precision.FP32: 1e-4, Precision.FP16: 1e-2, Precision.BF16: 8e-2}


def network_specs(
    pipeline: Any, family: Family, *, is_controlled: bool = False
) -> list[NetworkSpec]:
    """The networks that every checkpoint of a family has, in the order of a picture's making.

    Args:
        is_controlled: the UNet takes the residuals of ControlNets.
    """
    denoiser = (
        _transformer(pipeline, family)
        if family.denoiser == "transformer"
        else _unet(pipeline, family, is_controlled=is_controlled)
    )
    return [
        *(
            (_t5_encoder if encoder.kind == "t5" else _clip_encoder)(pipeline, family, encoder)
            for encoder in text_encoders(family, pipeline)
        ),
        denoiser,
        _vae_decoder(pipeline, family),
        _vae_encoder(pipeline, family),
    ]


def residuals(pipeline: Any) -> tuple[Residual, ...]:
    """What ControlNets add to this UNet: to each map that it keeps on its way down, and halfway."""
    channels = pipeline.unet.config.block_out_channels
    layers = pipeline.unet.config.layers_per_block
    maps = [(channels[0], 1)]
    for level, width in enumerate(channels):
        num_layers = layers if isinstance(layers, int) else layers[level]
        maps += [(width, 2**level)] * num_layers
        if level < len(channels) - 1:
            maps.append((width, 2 ** (level + 1)))
    down = [Residual(f"down_block_res_sample_{i}", *size) for i, size in enumerate(maps)]
    return *down, Residual("mid_block_res_sample", channels[-1], 2 ** (len(channels) - 1))


def residual_tensor(residual: Residual, grid: int) -> TensorSpec:
    factor = grid // residual.divisor
    shape = (residual.channels, f"{factor}*height", f"{factor}*width")
    return TensorSpec(residual.name, _FLOAT32, shape)


def _zeros_like_sample(residual: Residual) -> dict[str, object]:
    return {"channels": residual.channels, "divisor": residual.divisor, "like": "sample"}


def conditions(pipeline: Any, family: Family) -> tuple[TensorSpec, ...]:
    """What UNet and ControlNets take besides their picture: the time, the text, SDXL's numbers."""
    config = pipeline.unet.config
    expected = "text_time" if family.time_ids else None
    if config.addition_embed_type != expected:
        raise ExportError(
            f"unet: addition_embed_type {config.addition_embed_type!r} is not supported here, but "
            f"{expected!r}"
        )
    tensors = [
        TensorSpec("timestep", _FLOAT32, (), uniform(999)),
        TensorSpec("encoder_hidden_states", _FLOAT32, ("sequence", config.cross_attention_dim)),
    ]
    if family.time_ids:
        num_ids = sum(TIME_ID_SIZES[name] for name in family.time_ids)
        pooled = pipeline.text_encoder_2.config.projection_dim
        tensors += [
            TensorSpec("text_embeds", _FLOAT32, (pooled,)),
            TensorSpec("time_ids", _FLOAT32, (num_ids,), uniform(1024)),
        ]
    return tuple(tensors)


def _clip_encoder(pipeline: Any, _: Family, encoder: TextEncoder) -> NetworkSpec:
    module = getattr(pipeline, encoder.network)
    config = module.config
    length, hidden = config.max_position_embeddings, config.hidden_size
    is_last = encoder.hidden == "last_hidden_state"
    # The embeddings are a layer too; the last of all is left out where the one before conditions.
    num_layers = config.num_hidden_layers + is_last
    outputs = [
        TensorSpec(encoder.hidden, _FLOAT32, (length, hidden)),
        TensorSpec("hidden_states", _FLOAT32, (num_layers, length, hidden)),
    ]
    if encoder.is_pooled:
        outputs.append(TensorSpec("text_embeds", _FLOAT32, (config.projection_dim,)))
    return NetworkSpec(
        name=encoder.network,
        module=_ClipEncoder(module, is_last=is_last, is_pooled=encoder.is_pooled),
        inputs=(TensorSpec("input_ids", torch.int64, (length,), integers(config.vocab_size)),),
        outputs=tuple(outputs),
        tolerance=TOLERANCE,
    )


def _t5_encoder(pipeline: Any, family: Family, encoder: TextEncoder) -> NetworkSpec:
    module = getattr(pipeline, encoder.network)
    ids = integers(module.config.vocab_size)
    return NetworkSpec(
        name=encoder.network,
        module=_T5Encoder(module),
        inputs=(TensorSpec("input_ids", torch.int64, (family.t5_length,), ids),),
        outputs=(TensorSpec(encoder.hidden, _FLOAT32, (family.t5_length, module.config.d_model)),),
        tolerance=TOLERANCE,
        # In half precision T5's widest layer overflows, which is why transformers keeps it too.
        float32_parts=("wo",),
    )


def _unet(pipeline: Any, family: Family, *, is_controlled: bool) -> NetworkSpec:
    config = pipeline.unet.config
    grid = size_factor(pipeline, family)
    height, width = f"{grid}*height", f"{grid}*width"
    inputs = [
        TensorSpec("sample", _FLOAT32, (config.in_channels, height, width)),
        *conditions(pipeline, family),
    ]
    if config.time_cond_proj_dim is not None:
        inputs.append(TensorSpec("timestep_cond", _FLOAT32, (config.time_cond_proj_dim,)))
    if is_controlled:
        inputs += [
            replace(residual_tensor(residual, grid), optional=_zeros_like_sample(residual))
            for residual in residuals(pipeline)
        ]
    return NetworkSpec(
        name="unet",
        module=_UNet(pipeline.unet, [tensor.name for tensor in inputs]),
        inputs=tuple(inputs),
        outputs=(TensorSpec(family.output, _FLOAT32, (config.out_channels, height, width)),),
        tolerance=TOLERANCE,
        grid=grid,
    )


def _transformer(pipeline: Any, family: Family) -> NetworkSpec:
    config = pipeline.transformer.config
    grid = size_factor(pipeline, family)
    height, width = f"{grid}*height", f"{grid}*width"
    return NetworkSpec(
        name="transformer",
        module=_Transformer(pipeline.transformer),
        inputs=(
            TensorSpec("hidden_states", _FLOAT32, (config.in_channels, height, width)),
            TensorSpec("timestep", _FLOAT32, (), uniform(1000)),
            TensorSpec("encoder_hidden_states", _FLOAT32, ("sequence", config.joint_attention_dim)),
            TensorSpec("pooled_projections", _FLOAT32, (config.pooled_projection_dim,)),
        ),
        outputs=(TensorSpec(family.output, _FLOAT32, (config.out_channels, height, width)),),
        tolerance=TOLERANCE,
        grid=grid,
    )


def _vae_decoder(pipeline: Any, family: Family) -> NetworkSpec:
    factor = vae_scale_factor(pipeline)
    channels = pipeline.vae.config.latent_channels
    return NetworkSpec(
        name="vae_decoder",
        module=_VaeDecoder(pipeline.vae),
        inputs=(TensorSpec("latent_sample", _FLOAT32, (channels, "height", "width")),),
        outputs=(TensorSpec("sample", _FLOAT32, (3, f"{factor}*height", f"{factor}*width")),),
        tolerance=TOLERANCE,
        float32_parts=_vae_float32_parts(pipeline, family),
    )


def _vae_encoder(pipeline: Any, family: Family) -> NetworkSpec:
    factor = vae_scale_factor(pipeline)
    channels = pipeline.vae.config.latent_channels
    shape = (3, f"{factor}*height", f"{factor}*width")
    return NetworkSpec(
        name="vae_encoder",
        module=_VaeEncoder(pipeline.vae),
        inputs=(TensorSpec("sample", _FLOAT32, shape, _pixel_values),),
        outputs=(TensorSpec("latent_parameters", _FLOAT32, (2 * channels, "height", "width")),),
        tolerance=TOLERANCE,
        float32_parts=_vae_float32_parts(pipeline, family),
    )


def _pixel_values(size: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return 2 * torch.rand(size, generator=generator) - 1


def _vae_float32_parts(pipeline: Any, family: Family) -> tuple[str, ...]:
    """All of it where diffusers' pipelines keep it in float32: SDXL's overflows in half precision.

    Older VAEs carry the flag too, as a default that nothing reads.
    """
    is_upcast = family.time_ids and pipeline.vae.config.force_upcast
    return ("",) if is_upcast else ()


class _ClipEncoder(nn.Module):
    """What conditions, all layers up to it, and the pooled embedding where the family has one.

    Skipping the last n layers, as diffusers does, is taking layer -(n + 1) of the second.
    """

    def __init__(self, text_encoder: Any, *, is_last: bool, is_pooled: bool) -> None:
        super().__init__()
        self.text_encoder: Any = text_encoder
        self.is_last, self.is_pooled = is_last, is_pooled

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        output = self.text_encoder(input_ids, output_hidden_states=True)
        if self.is_last:
            # transformers 5 gives up the layer between the two.
            inner = getattr(self.text_encoder, "text_model", self.text_encoder)
            hidden = output.last_hidden_state
            layers = [inner.final_layer_norm(layer) for layer in output.hidden_states]
        else:
            layers = output.hidden_states[:-1]
            hidden = layers[-1]
        pooled = (output.text_embeds.float(),) if self.is_pooled else ()
        return hidden.float(), torch.stack(tuple(layers), dim=1).float(), *pooled


class _T5Encoder(nn.Module):
    def __init__(self, text_encoder: Any) -> None:
        super().__init__()
        self.text_encoder: Any = text_encoder

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.text_encoder(input_ids)[0]
        return hidden.float()


class _UNet(nn.Module):
    """The UNet, whose inputs come in the order of their names."""

    def __init__(self, unet: Any, names: Sequence[str]) -> None:
        super().__init__()
        self.unet: Any = unet
        self.names = tuple(names)

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        dtype = self.unet.dtype
        given = dict(zip(self.names, inputs, strict=True))
        # Sines of numbers are taken in float32, and what is joined to them is converted after.
        timestep = given.pop("timestep")
        added = {name: given.pop(name, None) for name in ("text_embeds", "time_ids")}
        given = {name: tensor.to(dtype) for name, tensor in given.items()}
        down = [tensor for name, tensor in given.items() if name.startswith("down_block_res")]
        output: torch.Tensor = self.unet(
            given["sample"],
            timestep,
            given["encoder_hidden_states"],
            timestep_cond=given.get("timestep_cond"),
            added_cond_kwargs=added,
            down_block_additional_residuals=down or None,
            mid_block_additional_residual=given.get("mid_block_res_sample"),
            return_dict=False,
        )[0]
        return output.float()


class _Transformer(nn.Module):
    def __init__(self, transformer: Any) -> None:
        super().__init__()
        self.transformer: Any = transformer

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        pooled_projections: torch.Tensor,
    ) -> torch.Tensor:
        dtype = self.transformer.dtype
        output: torch.Tensor = self.transformer(
            hidden_states=hidden_states.to(dtype),
            timestep=timestep,
            encoder_hidden_states=encoder_hidden_states.to(dtype),
            pooled_projections=pooled_projections.to(dtype),
            return_dict=False,
        )[0]
        return output.float()


class _VaeDecoder(nn.Module):
    """The half of the VAE that decodes: the other half is converted and freed on its own."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.post_quant_conv: Any = vae.post_quant_conv or nn.Identity()
        self.decoder: Any = vae.decoder

    def forward(self, latent_sample: torch.Tensor) -> torch.Tensor:
        latents = latent_sample.to(self.decoder.conv_in.weight.dtype)
        sample: torch.Tensor = self.decoder(self.post_quant_conv(latents))
        return sample.float()


class _VaeEncoder(nn.Module):
    """The half of the VAE that encodes: mean and clamped logarithm of the variance."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.encoder: Any = vae.encoder
        self.quant_conv: Any = vae.quant_conv or nn.Identity()

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        pixels = sample.to(self.encoder.conv_in.weight.dtype)
        mean, logvar = self.quant_conv(self.encoder(pixels)).float().chunk(2, dim=1)
        return torch.cat([mean, logvar.clamp(-30.0, 20.0)], dim=1)
