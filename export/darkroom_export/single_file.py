"""Checkpoints as one .safetensors file in the layout of their authors' own code."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers

from darkroom_export.errors import ExportError, first_line
from darkroom_export.weights import StoredTensor, default_dtype, read_header, stored_dtype

_UNET = "model.diffusion_model."
_PARTS = (_UNET, "first_stage_model.", "cond_stage_model.", "conditioner.", "text_encoders.")
_CONV_IN = f"{_UNET}input_blocks.0.0.weight"
_CONSISTENCY = f"{_UNET}time_embed.cond_proj.weight"

_FAMILIES = {
    f"{_UNET}joint_blocks.": "StableDiffusion3Pipeline",
    "conditioner.embedders.1.model.": "StableDiffusionXLPipeline",
    "conditioner.embedders.0.model.": "StableDiffusionXLImg2ImgPipeline",
    "cond_stage_model.": "StableDiffusionPipeline",
}
"""What a family's files have tensors of, and the pipeline class of each; the first that fits."""

_INPAINT = {
    "StableDiffusionPipeline": "StableDiffusionInpaintPipeline",
    "StableDiffusionXLPipeline": "StableDiffusionXLInpaintPipeline",
}


def load_single_file(
    path: Path, config: str | None, config_class: str | None
) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """The pipeline class of a single file, its components, and the pipeline's options.

    Args:
        config: the diffusers folder or hub id that describes the architecture.
        config_class: the pipeline class that the folder names.

    Raises:
        ExportError: the file is broken, holds something else, or is not what `config` describes.
    """
    tensors = read_header(path)
    class_name = pipeline_class_of(path, tensors)
    if config_class is not None:
        if _root(config_class) != _root(class_name):
            raise ExportError(
                f"{path}: is one of {class_name}, but {config} describes {config_class}"
            )
        class_name = config_class
    dtype = stored_dtype(path, (tensor for name, tensor in tensors.items() if _is_weight(name)))
    kind = getattr(diffusers, class_name)
    missing_t5 = {}
    if class_name == "StableDiffusion3Pipeline" and not any(".t5xxl." in name for name in tensors):
        missing_t5 = {"text_encoder_3": None, "tokenizer_3": None}
    try:
        # Told the type, diffusers would not say of a text encoder which weight is missing.
        with default_dtype(dtype):
            pipeline = kind.from_single_file(
                str(path),
                config=config,
                local_files_only=config is not None and Path(config).is_dir(),
                **missing_t5,
                **_without_safety_checker(class_name),
            )
    except NotImplementedError as error:
        # What diffusers says of a weight that is still without a value.
        raise ExportError(f"{path}: weights are missing, of the UNet or the VAE") from error
    except Exception as error:  # diffusers raises many kinds, all of them about this file
        hint = "" if config else " (--config DIR names a folder with the architecture)"
        raise ExportError(f"{path}: {first_line(error)}{hint}") from error
    parts = dict(pipeline.components)
    _check_complete(path, parts)
    options = {
        key: pipeline.config[key]
        for key in ("force_zeros_for_empty_prompt", "requires_aesthetics_score")
        if key in pipeline.config
    }
    return class_name, parts, options


def pipeline_class_of(path: Path, tensors: Mapping[str, StoredTensor]) -> str:
    """The pipeline class of diffusers that a file's tensors belong to.

    Raises:
        ExportError: they belong to none that is supported.
    """
    found = [
        kind for prefix, kind in _FAMILIES.items() if any(k.startswith(prefix) for k in tensors)
    ]
    if not found or not any(name.startswith(_UNET) for name in tensors):
        raise ExportError(
            f"{path}: holds no Stable Diffusion 1, 2, 3 or XL with its text encoders: "
            f"no tensors of {_UNET}* with {', '.join(f'{key}*' for key in _FAMILIES)}"
        )
    kind = found[0]
    if _CONSISTENCY in tensors:
        raise ExportError(
            f"{path}: a consistency model ({_CONSISTENCY}) is only supported as a diffusers folder"
        )
    conv_in = tensors.get(_CONV_IN)
    is_inpaint = conv_in is not None and len(conv_in.shape) == 4 and conv_in.shape[1] == 9
    return _INPAINT.get(kind, kind) if is_inpaint else kind


def _root(class_name: str) -> str:
    """Classes of one root load the same components."""
    for root in ("StableDiffusion3", "StableDiffusionXL"):
        if class_name.startswith(root):
            return root
    return "StableDiffusion"


def _is_weight(name: str) -> bool:
    # Tables of the noise schedule are float32 in files of half precision too.
    return name.startswith(_PARTS)


def _without_safety_checker(class_name: str) -> dict[str, Any]:
    is_possible = _root(class_name) == "StableDiffusion"
    return {"safety_checker": None, "feature_extractor": None} if is_possible else {}


def _check_complete(path: Path, parts: Mapping[str, Any]) -> None:
    for name, part in parts.items():
        if not hasattr(part, "state_dict"):
            continue
        missing = [key for key, tensor in part.state_dict().items() if tensor.is_meta]
        if missing:
            raise ExportError(f"{path}: {name}: weights are missing: {', '.join(missing[:3])}")
