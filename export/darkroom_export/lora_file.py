"""What a LoRA file holds, whichever program wrote it: low-rank changes of layers, by their path."""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch

from darkroom_export.errors import ExportError

_DOWN, _UP, _ALPHA = "down", "up", "alpha"
# How a key ends; the first that fits counts.
_ENDS = {
    ".lora_down.weight": _DOWN,
    ".lora_up.weight": _UP,
    ".lora_A.weight": _DOWN,
    ".lora_B.weight": _UP,
    ".lora.down.weight": _DOWN,
    ".lora.up.weight": _UP,
    ".lora_linear_layer.down.weight": _DOWN,
    ".lora_linear_layer.up.weight": _UP,
    "_lora.down.weight": _DOWN,
    "_lora.up.weight": _UP,
    ".alpha": _ALPHA,
}
_OTHER_KINDS = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "oft_": "OFT",
    "lora_mid": "a Tucker decomposition",
    ".diff": "a difference of whole weights",
    ".lora_B.bias": "a change of a bias",
}
DENOISERS = ("unet", "transformer")
# kohya's trainer, and those that write like it, join the parts of a path with "_".
_JOINED_PREFIXES = {
    "lora_unet_": DENOISERS,
    "lora_transformer_": DENOISERS,
    "lora_te_": ("text_encoder",),
    "lora_te1_": ("text_encoder",),
    "lora_te2_": ("text_encoder_2",),
    "lora_te3_": ("text_encoder_3",),
}
_SGM_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_SGM_ENDS = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_OLD_ENCODER_NAMES = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}


@dataclass(frozen=True)
class LoraLayer:
    """The change of one layer: up @ down, float32, with what the file scales it by in `up`."""

    down: torch.Tensor
    """(rank, in), or (rank, in, height, width) of a convolution."""
    up: torch.Tensor
    """(out, rank)"""

    @property
    def rank(self) -> int:
        return len(self.down)


class LoraContents:
    """The layers of a LoRA file by the names that it gives them."""

    def __init__(self, path: Path) -> None:
        """Read a file.

        Raises:
            ExportError: it is no .safetensors file, or holds anything besides LoRA layers.
        """
        self.path = path
        tensors, self._metadata = _read(path)
        self._settings = _peft_settings(path, self._metadata)
        self._layers = self._pair(tensors)
        if not self._layers:
            raise ExportError(f"{path}: holds no LoRA")

    def assign(
        self, networks: Mapping[str, Mapping[str, tuple[int, ...]]]
    ) -> dict[str, dict[str, LoraLayer]]:
        """The layers by network and path.

        Args:
            networks: the shape of every weight that can be changed, by network and path.

        Raises:
            ExportError: a layer is none of those, or has another shape.
        """
        names = {name: _layer_names(name, shapes) for name, shapes in networks.items()}
        assigned: dict[str, dict[str, LoraLayer]] = {}
        strangers = []
        for name, layer in self._layers.items():
            found = _find(name, names)
            if found is None:
                strangers.append(name)
                continue
            network, path = found
            self._check_shape(name, layer, f"{network}.{path}", networks[network][path])
            if path in assigned.setdefault(network, {}):
                raise ExportError(f"{self.path}: {name}: changes {network}.{path} a second time")
            assigned[network][path] = layer
        if strangers:
            raise ExportError(self._unknown(strangers))
        return assigned

    def _pair(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, LoraLayer]:
        parts: dict[str, dict[str, torch.Tensor]] = {}
        for key, tensor in tensors.items():
            name, part = self._split(key)
            if part in parts.setdefault(name, {}):
                raise ExportError(f"{self.path}: {key}: {name} has two of its kind")
            if not torch.isfinite(tensor).all():
                raise ExportError(f"{self.path}: {key}: is not finite")
            parts[name][part] = tensor.to(torch.float32)
        return {name: self._layer(name, found) for name, found in parts.items()}

    def _split(self, key: str) -> tuple[str, str]:
        for mark, kind in _OTHER_KINDS.items():
            if mark in key:
                raise ExportError(f"{self.path}: {key}: is {kind}, only LoRA is supported")
        for end, part in _ENDS.items():
            if key.endswith(end):
                # A place of older diffusers' own.
                return key.removesuffix(end).replace(".processor.", "."), part
        raise ExportError(f"{self.path}: {key}: is no key of a LoRA")

    def _layer(self, name: str, parts: Mapping[str, torch.Tensor]) -> LoraLayer:
        for part in (_DOWN, _UP):
            if part not in parts:
                raise ExportError(f"{self.path}: {name}: has no {part} weight")
        down, up = parts[_DOWN], parts[_UP]
        rank = len(down)
        if down.ndim not in (2, 4) or up.ndim not in (2, 4) or up.numel() != len(up) * rank:
            raise ExportError(
                f"{self.path}: {name}: {_shape(down)} and {_shape(up)} are no down and up weights"
            )
        if _ALPHA in parts:
            scale = float(parts[_ALPHA]) / rank
        else:
            scale = _peft_scale(self._settings, name, rank)
        return LoraLayer(down, up.reshape(len(up), rank) * scale)

    def _check_shape(self, name: str, layer: LoraLayer, path: str, weight: tuple[int, ...]) -> None:
        is_pixelwise = layer.down.shape[2:] in ((), (1, 1)) and math.prod(weight[2:]) == 1
        down = layer.down.flatten(1)
        fits = (len(layer.up), down.shape[1]) == (weight[0], math.prod(weight[1:]))
        if not (fits and (is_pixelwise or layer.down.shape[2:] == weight[2:])):
            raise ExportError(
                f"{self.path}: {name}: {_shape(layer.down)} and {_shape(layer.up)} do not fit "
                f"{path} of {'x'.join(map(str, weight))}{self._origin()}"
            )

    def _unknown(self, names: list[str]) -> str:
        num_layers = len(self._layers)
        return (
            f"{self.path}: of its {num_layers} layers, {len(names)} are none that can be changed "
            f"here: {', '.join(names[:3])}{', ...' if names[3:] else ''}{self._origin()}"
        )

    def _origin(self) -> str:
        """What kohya's trainer says of the checkpoint that the file was trained on."""
        origin = self._metadata.get("ss_base_model_version")
        return f" (it was made for {origin})" if origin else " (is it of another family?)"


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    if path.suffix != ".safetensors":
        # Pickles run code when they are read.
        raise ExportError(f"{path}: a LoRA must be a .safetensors file")
    if not path.is_file():
        raise ExportError(f"{path}: no such file")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  no dict
            return tensors, file.metadata() or {}
    except (OSError, safetensors.SafetensorError) as error:
        raise ExportError(f"{path}: {error}") from error


def _peft_settings(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """The settings of peft, which travel as JSON, if they do."""
    try:
        settings = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        return dict(settings)
    except (ValueError, TypeError) as error:
        raise ExportError(f"{path}: lora_adapter_metadata: {error}") from error


def _peft_scale(settings: Mapping[str, Any], name: str, rank: int) -> float:
    """What peft would scale a layer by."""
    network, _, path = name.partition(".")

    def setting(key: str, default: Any = None) -> Any:
        return settings.get(f"{network}.{key}", default)

    alpha = setting("lora_alpha", rank)
    for pattern, value in setting("alpha_pattern", {}).items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            alpha = value
            break
    return float(alpha) / (math.sqrt(rank) if setting("use_rslora") else rank)


def _find(name: str, names: Mapping[str, Mapping[str, str]]) -> tuple[str, str] | None:
    """The network and the path of the layer that a file calls `name`."""
    network, _, rest = name.partition(".")
    if network in names:
        path = names[network].get(rest)
        return (network, path) if path else None
    for prefix, candidates in _JOINED_PREFIXES.items():
        for network in candidates:
            if name.startswith(prefix) and network in names:
                path = names[network].get(name.removeprefix(prefix))
                return (network, path) if path else None
    return None


def _layer_names(network: str, paths: Iterable[str]) -> dict[str, str]:
    """Every name that files know a layer by, and its path."""
    paths = list(paths)
    if network in DENOISERS:
        num_layers = _layers_per_block(paths)
        on_the_way_up = [path.split(".") for path in paths if path.startswith("up_blocks.")]
        with_attention = {parts[1] for parts in on_the_way_up if parts[2] == "attentions"}
        pairs = [(path, path) for path in paths]
        pairs += [(path.removesuffix(".0"), path) for path in paths if path.endswith("to_out.0")]
        pairs += [(_sgm_name(path, num_layers, with_attention), path) for path in paths]
    else:
        # transformers 5 gives up the first part of it for some classes.
        pairs = [(f"text_model.{path.removeprefix('text_model.')}", path) for path in paths]
        pairs += [(path.removeprefix("text_model."), path) for path in paths]
        for name, path in list(pairs):
            head, _, end = name.rpartition(".")
            if end in _OLD_ENCODER_NAMES:
                pairs.append((f"{head}.{_OLD_ENCODER_NAMES[end]}", path))
    joined = {name.replace(".", "_"): path for name, path in pairs}
    return joined | dict(pairs)


def _layers_per_block(paths: Iterable[str]) -> int:
    """Of a UNet, by the numbers in its paths: those on the way up have one layer more."""
    pattern = re.compile(r"(down|up)_blocks\.\d+\.(?:attentions|resnets)\.(\d+)\.")
    found = [match for match in map(pattern.match, paths) if match]
    return max((int(match[2]) + (match[1] == "down") for match in found), default=0)


def _sgm_name(path: str, num_layers: int, with_attention: set[str]) -> str:
    """The name of a UNet's layer in Stability AI's code, on which SDXL is mostly trained.

    Args:
        num_layers: of a block on the way down.
        with_attention: the blocks on the way up that have it.
    """
    if path in _SGM_ENDS:
        return _SGM_ENDS[path]
    match path.split("."):
        case [("down_blocks" | "up_blocks") as way, block, kind, layer, *rest]:
            is_down = way == "down_blocks"
            number = int(block) * (num_layers + 1) + is_down
            if kind in ("downsamplers", "upsamplers"):
                number += num_layers
                place = 0 if is_down else 1 + (block in with_attention)
                rest = ["op" if is_down else "conv"]
            else:
                number += int(layer)
                place = int(kind == "attentions")
            head = f"{'input' if is_down else 'output'}_blocks.{number}.{place}"
        case ["mid_block", kind, layer, *rest]:
            head = f"middle_block.{1 if kind == 'attentions' else 2 * int(layer)}"
        case _:
            return path
    return ".".join([head, *(_SGM_RESNET.get(part, part) for part in rest)])


def _shape(tensor: torch.Tensor) -> str:
    return "x".join(map(str, tensor.shape))
