"""LoRA as inputs of a graph: every row of a call takes its own share of each adapter.

Each layer that can be changed computes

    y = W x + ((x down^T) * scale) up^T

where `down` (R, in) and `up` (out, R) are the adapters of a call, stacked along their ranks, and
`scale` (batch, R) says how much of each a row gets. So the rows of one call can have different
adapters, several, or none. The weights of the adapters lie beside the graph, and never leave its
process.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

from darkroom_export.errors import ExportError
from darkroom_export.networks import InputShape, NetworkSpec, TensorSpec

LORA_SCALE = "lora_scale"
DOWN, UP = ".lora_down", ".lora_up"
"""How the inputs of a layer end."""
# What trainers change: attention and its feed-forward layers, which see each row's own tokens.
_ADAPTABLE = re.compile(
    r"(.*\.)?(attentions|transformer_blocks)\.\d+\."
    r"(.*\.)?(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out|proj_in|proj_out"
    r"|ff(_context)?\.net\.(0\.proj|2))"
)
_EXAMPLE_RANK = 3


@dataclass(frozen=True)
class WeightSpec(TensorSpec):
    """An input that all rows share, without a batch dimension; what runs the graph knows it."""


@dataclass(frozen=True)
class LoraSpec(NetworkSpec):
    """A network with LoRA inputs."""

    def size(self, tensor: TensorSpec, shape: InputShape) -> tuple[int, ...]:
        """What `tensor` measures in a call of the given shape, and of some rank."""
        if "rank" not in tensor.shape:
            return super().size(tensor, shape)
        size = tuple(_EXAMPLE_RANK if width == "rank" else int(width) for width in tensor.shape)
        return size if isinstance(tensor, WeightSpec) else (shape.batch, *size)


def add_lora_inputs(spec: NetworkSpec) -> LoraSpec:
    """The denoiser with inputs for LoRA adapters; its module's layers are replaced in place.

    Raises:
        ExportError: it has no layer that an adapter could change.
    """
    network = getattr(spec.module, spec.name)
    layers = adaptable_layers(network)
    if not layers:
        raise ExportError(f"{spec.name}: has no layer that a LoRA could change")
    call = _Call()
    for path, layer in layers.items():
        network.set_submodule(path, _Adaptable(layer, path, call))
    tensors = [TensorSpec(LORA_SCALE, torch.float32, ("rank",), _shares, optional={})]
    for path, layer in layers.items():
        width_out, width_in = layer.weight.shape[:2]
        for end, shape in ((DOWN, ("rank", width_in)), (UP, (width_out, "rank"))):
            tensors.append(WeightSpec(path + end, torch.float32, shape, _small, optional={}))
    others = {field.name: getattr(spec, field.name) for field in fields(spec)}
    others["module"] = _WithLora(spec.module, call, tuple(layers))
    others["inputs"] = (*spec.inputs, *tensors)
    return LoraSpec(**others)


def adaptable_layers(network: nn.Module) -> dict[str, Any]:
    """The layers that LoRA inputs reach, by path."""
    found = {}
    for path, module in network.named_modules():
        layer = module.layer if isinstance(module, _Adaptable) else module
        is_linear = isinstance(layer, nn.Linear)
        is_pixelwise = isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1)
        if _ADAPTABLE.fullmatch(path) and (is_linear or is_pixelwise):
            found[path] = layer
    return found


def lora_widths(spec: NetworkSpec) -> dict[str, tuple[int, int]]:
    """In and out of the layers that take adapters, by path; none if it has no LoRA inputs."""
    shapes = {tensor.name: tensor.shape for tensor in spec.inputs if isinstance(tensor, WeightSpec)}
    layers = [name.removesuffix(DOWN) for name in shapes if name.endswith(DOWN)]
    return {layer: (int(shapes[layer + DOWN][1]), int(shapes[layer + UP][0])) for layer in layers}


class _Call:
    """The LoRA inputs of the call that is under way, where the layers find them."""

    def __init__(self) -> None:
        self.scale = torch.zeros(0)
        self.weights: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}


class _WithLora(nn.Module):
    def __init__(self, module: nn.Module, call: _Call, paths: Sequence[str]) -> None:
        super().__init__()
        self.module = module
        self.call = call
        self.paths = tuple(paths)

    def forward(self, *inputs: torch.Tensor) -> Any:
        num_weights = 2 * len(self.paths)
        *others, self.call.scale = inputs[:-num_weights]
        weights = inputs[-num_weights:]
        pairs = zip(weights[::2], weights[1::2], strict=True)
        self.call.weights = dict(zip(self.paths, pairs, strict=True))
        return self.module(*others)


class _Adaptable(nn.Module):
    """A linear layer, or a convolution of single pixels, and what the call's adapters add to it."""

    def __init__(self, layer: nn.Module, path: str, call: _Call) -> None:
        super().__init__()
        self.layer = layer
        self.path = path
        self.call = call

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """`hidden` is (batch, tokens, in), or (batch, in, height, width) of a convolution."""
        output: torch.Tensor = self.layer(hidden)
        dtype = output.dtype
        down, up = (weight.to(dtype) for weight in self.call.weights[self.path])
        scale = self.call.scale.to(dtype)
        if isinstance(self.layer, nn.Conv2d):
            inner = torch.matmul(down, hidden.flatten(2)) * scale[:, :, None]
            return output + torch.matmul(up, inner).reshape(output.shape)
        inner = nn.functional.linear(hidden, down) * scale[:, None]
        return output + nn.functional.linear(inner, up)


def _shares(size: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.rand(size, generator=generator)


def _small(size: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Changes a layer by some tenths: if by more, attention multiplies every rounding."""
    return torch.randn(size, generator=generator) / (2 * math.sqrt(size[-1]))
