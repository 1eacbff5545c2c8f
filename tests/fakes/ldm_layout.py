"""Rename a diffusers checkpoint to the layout of the original single-file checkpoints."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

_UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "time_embedding.cond_proj": "time_embed.cond_proj",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_OPENCLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm": "ln_final",
    "encoder.layers": "transformer.resblocks",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn": "attn",
    "fc1": "c_fc",
    "fc2": "c_proj",
}
_CLIP_PREFIX = "cond_stage_model.transformer."
_OPENCLIP_PREFIX = "cond_stage_model.model."
_SDXL_CLIP_PREFIX = "conditioner.embedders.0.transformer."
_SDXL_OPENCLIP_PREFIX = "conditioner.embedders.{}.model."
_VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}


def write_ldm_checkpoint(folder: Path, path: Path) -> None:
    """Write the diffusers folder of a Stable Diffusion 1, 2 or XL model as one .safetensors file.

    The text encoder of Stable Diffusion 2 and the second one of XL go to OpenCLIP's layout.
    """
    unet = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    vae = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
    unet_config = json.loads((folder / "unet" / "config.json").read_text())
    vae_config = json.loads((folder / "vae" / "config.json").read_text())
    weights = {f"model.diffusion_model.{_unet_key(k, unet_config)}": v for k, v in unet.items()}
    for key, tensor in vae.items():
        name = f"first_stage_model.{_vae_key(key, vae_config)}"
        is_convolution = ".attn_1." in name and tensor.ndim == 2
        weights[name] = tensor[:, :, None, None] if is_convolution else tensor
    for prefix, name in _text_encoders(folder, unet_config).items():
        text = load_file(folder / name / "model.safetensors")
        is_openclip = prefix.endswith(".model.")
        renamed = _openclip(text) if is_openclip else _clip(text)
        weights |= {f"{prefix}{key}": tensor for key, tensor in renamed.items()}
    save_file({key: tensor.contiguous() for key, tensor in weights.items()}, path)


def _text_encoders(folder: Path, unet_config: dict[str, Any]) -> dict[str, str]:
    """The folder's text encoders, by what the names of their tensors begin with."""
    if not (folder / "text_encoder_2").exists():
        is_sd2 = unet_config["use_linear_projection"]
        return {_OPENCLIP_PREFIX if is_sd2 else _CLIP_PREFIX: "text_encoder"}
    if not (folder / "text_encoder").exists():
        return {_SDXL_OPENCLIP_PREFIX.format(0): "text_encoder_2"}
    return {
        _SDXL_CLIP_PREFIX: "text_encoder",
        _SDXL_OPENCLIP_PREFIX.format(1): "text_encoder_2",
    }


def _clip(weights: dict[str, Any]) -> dict[str, Any]:
    return {f"text_model.{key.removeprefix('text_model.')}": t for key, t in weights.items()}


def _openclip(weights: dict[str, Any]) -> dict[str, Any]:
    renamed = {}
    for key, tensor in weights.items():
        name = key.removeprefix("text_model.")
        for ours, theirs in _OPENCLIP.items():
            name = name.replace(ours, theirs)
        if name == "text_projection.weight":
            renamed["text_projection"] = tensor.T
        elif ".q_proj." in name:
            # The three are one.
            parts = [weights[key.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"]
            kind = name.rpartition(".")[2]
            renamed[name.replace(f".q_proj.{kind}", f".in_proj_{kind}")] = torch.cat(parts)
        elif not (".k_proj." in name or ".v_proj." in name):
            renamed[name] = tensor
    return renamed


def _unet_key(key: str, config: dict[str, Any]) -> str:
    for ours, theirs in _UNET_ENDS.items():
        if key.startswith(f"{ours}."):
            return key.replace(ours, theirs, 1)
    per_block = config["layers_per_block"] + 1
    block, *rest = key.split(".")
    if block == "mid_block":
        kind, index, *rest = rest
        # resnet, attention, resnet
        place = 1 if kind == "attentions" else 2 * int(index)
        return _join("middle_block", place, _resnet(kind, rest))
    number, kind, index, *rest = rest
    first = int(number) * per_block
    if block == "down_blocks":
        if kind == "downsamplers":
            return _join("input_blocks", first + per_block, 0, ["op", *rest[1:]])
        place = 1 if kind == "attentions" else 0
        return _join("input_blocks", 1 + first + int(index), place, _resnet(kind, rest))
    if kind == "upsamplers":
        has_attention = config["up_block_types"][int(number)].startswith("CrossAttn")
        return _join("output_blocks", first + per_block - 1, 2 if has_attention else 1, rest)
    place = 1 if kind == "attentions" else 0
    return _join("output_blocks", first + int(index), place, _resnet(kind, rest))


def _resnet(kind: str, rest: list[str]) -> list[str]:
    return [_UNET_RESNET[rest[0]], *rest[1:]] if kind == "resnets" else rest


def _vae_key(key: str, config: dict[str, Any]) -> str:
    last = len(config["up_block_types"]) - 1
    side, *rest = key.split(".")
    if not rest or side in ("quant_conv", "post_quant_conv"):
        return key
    block, *rest = rest
    if block == "conv_norm_out":
        return _join(side, "norm_out", rest)
    if block == "mid_block":
        kind, index, *rest = rest
        if kind == "resnets":
            return _join(side, "mid", f"block_{int(index) + 1}", _shortcut(rest))
        joined = ".".join(rest)
        for ours, theirs in _VAE_ATTENTION.items():
            joined = joined.replace(f"{ours}.", f"{theirs}.", 1)
        return _join(side, "mid", "attn_1", [joined])
    if block not in ("down_blocks", "up_blocks"):
        return key
    number, kind, index, *rest = rest
    way = block.removesuffix("_blocks")
    level = int(number) if way == "down" else last - int(number)
    place = ["block", index] if kind == "resnets" else [f"{way}sample"]
    return _join(side, way, level, place, _shortcut(rest))


def _shortcut(rest: list[str]) -> list[str]:
    return ["nin_shortcut" if word == "conv_shortcut" else word for word in rest]


def _join(*words: str | int | list[str]) -> str:
    flat = [word for part in words for word in (part if isinstance(part, list) else [part])]
    return ".".join(map(str, flat))
