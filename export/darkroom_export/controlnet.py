"""ControlNets: found, checked against the UNet that they steer, and described as networks."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from darkroom_export.checkpoint import CheckpointFiles, find_controlnet, load_controlnet
from darkroom_export.errors import ExportError
from darkroom_export.families import Family, size_factor, vae_scale_factor
from darkroom_export.networks import (
    TOLERANCE,
    NetworkSpec,
    TensorSpec,
    conditions,
    residual_tensor,
    residuals,
    uniform,
)

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
_SHAPE_KEYS = (
    "cross_attention_dim",
    "block_out_channels",
    "layers_per_block",
    "addition_embed_type",
    "projection_class_embeddings_input_dim",
)


@dataclass(frozen=True)
class ControlNet:
    """A ControlNet on disk, and what requests call it."""

    name: str
    files: CheckpointFiles

    @property
    def network(self) -> str:
        return f"controlnet_{self.name}"


def find_controlnets(sources: Mapping[str, str]) -> list[ControlNet]:
    """Find and hash ControlNets by the names that requests will use.

    Raises:
        ExportError: a name cannot be one of a network, or there is no such ControlNet.
    """
    for name in sources:
        check_name("controlnet", name)
    return [ControlNet(name, find_controlnet(source)) for name, source in sources.items()]


def check_name(kind: str, name: str) -> None:
    """Refuse a name that a folder could not have.

    Raises:
        ExportError: names it, and what a name has.
    """
    if not _NAME.fullmatch(name):
        raise ExportError(
            f"{kind} {name!r}: a name has 1 to 64 lower-case letters, digits, - and _, and begins "
            "with a letter or digit"
        )


def check_controlnets(controlnets: list[ControlNet], pipeline: Any, family: Family) -> None:
    """Refuse ControlNets whose residuals do not fit the denoiser.

    Raises:
        ExportError: names the ControlNet and what does not fit.
    """
    for controlnet in controlnets:
        if family.denoiser != "unet":
            raise ExportError(
                f"controlnet {controlnet.name}: not supported, this family has no UNet"
            )
        # One at a time; its weights are loaded again when its turn comes.
        _check(controlnet.name, load_controlnet(controlnet.files).config, pipeline)


def _check(name: str, config: Any, pipeline: Any) -> None:
    unet, vae = pipeline.unet.config, pipeline.vae.config
    pairs = {key: (config.get(key), unet.get(key)) for key in _SHAPE_KEYS}
    pairs["in_channels"] = (config.in_channels, vae.latent_channels)
    # A halving for each step from one width to the next.
    factor = 2 ** (len(config.conditioning_embedding_out_channels) - 1)
    pairs["pixels per latent"] = (factor, vae_scale_factor(pipeline))
    for key, (ours, theirs) in pairs.items():
        if _listed(ours) != _listed(theirs):
            raise ExportError(
                f"controlnet {name}: does not fit the UNet: its {key} is {ours}, but {theirs} is "
                "needed"
            )


def _listed(value: Any) -> Any:
    """JSON knows lists alone."""
    return list(value) if isinstance(value, tuple) else value


def controlnet_spec(controlnet: ControlNet, pipeline: Any, family: Family) -> NetworkSpec:
    """Load a ControlNet and say what it takes and gives."""
    module = load_controlnet(controlnet.files)
    grid = size_factor(pipeline, family)
    factor = grid * vae_scale_factor(pipeline)
    picture = (3, f"{factor}*height", f"{factor}*width")
    sample = (module.config.in_channels, f"{grid}*height", f"{grid}*width")
    inputs = (
        TensorSpec("sample", torch.float32, sample),
        *conditions(pipeline, family),
        TensorSpec("controlnet_cond", torch.float32, picture, uniform(1.0)),
        TensorSpec("conditioning_scale", torch.float32, (), uniform(2.0)),
    )
    return NetworkSpec(
        name=controlnet.network,
        module=_ControlNet(module, tuple(tensor.name for tensor in inputs)),
        inputs=inputs,
        outputs=tuple(residual_tensor(residual, grid) for residual in residuals(pipeline)),
        tolerance=TOLERANCE,
        grid=grid,
    )


class _ControlNet(nn.Module):
    """The ControlNet, whose inputs come in the order of their names, with a scale for each row."""

    def __init__(self, controlnet: Any, names: tuple[str, ...]) -> None:
        super().__init__()
        self.controlnet: Any = controlnet
        self.names = names

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        dtype = self.controlnet.dtype
        given = dict(zip(self.names, inputs, strict=True))
        added = {name: given.get(name) for name in ("text_embeds", "time_ids")}
        down, middle = self.controlnet(
            given["sample"].to(dtype),
            given["timestep"],
            given["encoder_hidden_states"].to(dtype),
            given["controlnet_cond"].to(dtype),
            added_cond_kwargs=added,
            return_dict=False,
        )
        scale = given["conditioning_scale"].reshape(-1, 1, 1, 1)
        return tuple(scale * tensor.float() for tensor in (*down, middle))
