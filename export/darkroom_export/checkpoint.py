"""Load a checkpoint, recognise its family and pin it by hash."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from darkroom_export.errors import ExportError
from darkroom_export.quiet import quieten

FAMILIES = {"StableDiffusionPipeline": "sd1"}
"""Supported pipeline classes of diffusers, and the family each belongs to."""

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")


@dataclass(frozen=True)
class CheckpointFiles:
    """A checkpoint on disk, pinned by its contents."""

    source: str
    """What the user named: a folder, a file or a hub id."""
    path: Path
    """The diffusers folder, or the single .safetensors file."""
    sha256: str


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint: float32 weights on the CPU, UniPC in the place of its scheduler."""

    files: CheckpointFiles
    family: str
    pipeline: Any


def find_checkpoint(source: str, config: str | None = None) -> CheckpointFiles:
    """Find a diffusers folder, a single .safetensors file, or a hub id, and hash it.

    Args:
        config: for a single file, what describes its architecture; a folder counts into the hash.

    Raises:
        ExportError: there is no such checkpoint, or it is of a family that is not supported.
    """
    path = Path(source)
    if path.suffix == ".safetensors":
        if not path.is_file():
            raise ExportError(f"{path}: no such file")
        # The scheduler and the tokenizer come from the architecture's folder.
        described = sorted(Path(config).rglob("*")) if config and Path(config).is_dir() else []
        parts = [file for file in described if file.suffix in (".json", ".txt")]
        return CheckpointFiles(source, path, _sha256([path, *parts]))
    folder = path if path.is_dir() else _download(source)
    _check_index(folder)
    parts = sorted(file for file in folder.rglob("*") if _is_part(file))
    return CheckpointFiles(source, folder, _sha256(parts))


def load_checkpoint(files: CheckpointFiles, config: str | None = None) -> Checkpoint:
    """Load what `find_checkpoint` found.

    Args:
        config: for a single file, the diffusers folder or hub id that describes its architecture;
            left out, diffusers infers it and may have to ask the hub.

    Raises:
        ExportError: a part is missing or broken, or the family is not supported.
    """
    quieten()
    path = files.path
    pipeline = _load_single_file(path, config) if path.is_file() else _load_folder(path)
    family = FAMILIES.get(type(pipeline).__name__)
    if family is None:
        raise ExportError(_unsupported(str(path), type(pipeline).__name__))
    for name in ("text_encoder", "unet", "vae"):
        missing = [key for key, t in getattr(pipeline, name).state_dict().items() if t.is_meta]
        if missing:
            raise ExportError(f"{path}: {name}: weights are missing: {', '.join(missing[:3])}")
    # Half-precision weights are exact in float32; what they should be served in is decided later.
    pipeline.to(torch.float32)
    pipeline.scheduler = _unipc(str(path), pipeline.scheduler)
    return Checkpoint(files, family, pipeline)


def _load_folder(folder: Path) -> Any:
    parts = {
        name: _load_part(folder, name, kind)
        for name, kind in (
            ("text_encoder", transformers.CLIPTextModel),
            ("unet", diffusers.UNet2DConditionModel),
            ("vae", diffusers.AutoencoderKL),
        )
    }
    tokenizer = folder / "tokenizer"
    # transformers makes an empty tokenizer of a missing one.
    if not any((tokenizer / file).is_file() for file in ("vocab.json", "tokenizer.json")):
        raise ExportError(f"{tokenizer}: has neither vocab.json nor tokenizer.json")
    try:
        return diffusers.StableDiffusionPipeline.from_pretrained(
            folder,
            **parts,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
            local_files_only=True,
        )
    except Exception as error:  # diffusers raises many kinds, all of them about this folder
        raise ExportError(f"{folder}: {_first_line(error)}") from error


def _load_part(folder: Path, name: str, kind: Any) -> Any:
    try:
        # Pickles run code when they are read: weights are safetensors or nothing.
        module, report = kind.from_pretrained(
            folder,
            subfolder=name,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except Exception as error:  # diffusers and transformers raise many kinds
        raise ExportError(f"{folder / name}: {_first_line(error)}") from error
    if report["missing_keys"]:
        # They would be random numbers.
        missing = ", ".join(sorted(report["missing_keys"])[:3])
        raise ExportError(f"{folder / name}: weights are missing: {missing}")
    return module


def _load_single_file(path: Path, config: str | None) -> Any:
    try:
        return diffusers.StableDiffusionPipeline.from_single_file(
            str(path),
            config=config,
            safety_checker=None,
            feature_extractor=None,
            local_files_only=config is not None and Path(config).is_dir(),
        )
    except Exception as error:  # as above
        hint = "" if config else " (--config DIR names a folder with the architecture)"
        raise ExportError(f"{path}: {_first_line(error)}{hint}") from error


def _download(source: str) -> Path:
    if source.startswith((".", "/")) or source.count("/") != 1:
        raise ExportError(
            f"{source}: no such folder, and not a hub id of the form owner/name either"
        )
    try:
        patterns = ["*.json", "*.txt", "*.safetensors"]
        return Path(diffusers.StableDiffusionPipeline.download(source, allow_patterns=patterns))
    except Exception as error:  # network, authorisation, missing: all end the same way
        raise ExportError(f"{source}: not a folder here, and {_first_line(error)}") from error


def _check_index(folder: Path) -> None:
    index = folder / "model_index.json"
    try:
        class_name = json.loads(index.read_text())["_class_name"]
    except FileNotFoundError:
        raise ExportError(f"{index}: missing, so {folder} is no diffusers folder") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ExportError(f"{index}: malformed, {error!r}") from None
    if class_name not in FAMILIES:
        raise ExportError(_unsupported(str(index), class_name))


def _unsupported(where: str, class_name: str) -> str:
    return f"{where}: {class_name} is not supported, there are {', '.join(FAMILIES)}"


def _unipc(source: str, scheduler: Any) -> Any:
    """UniPC with the noise schedule that the checkpoint's own scheduler describes."""
    unipc = diffusers.UniPCMultistepScheduler.from_config(scheduler.config)
    refused = ("thresholding", "use_flow_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
    for key in refused:
        if unipc.config[key]:
            raise ExportError(f"{source}: scheduler config {key} is not supported")
    prediction_type = unipc.config.prediction_type
    if prediction_type not in PREDICTION_TYPES:
        raise ExportError(
            f"{source}: scheduler config prediction_type {prediction_type!r} is not supported, "
            f"there are {', '.join(PREDICTION_TYPES)}"
        )
    return unipc


def _is_part(file: Path) -> bool:
    return file.suffix in (".json", ".txt", ".safetensors") and not file.name.startswith(".")


def _sha256(files: list[Path]) -> str:
    """Of the files' contents in order; names do not count, so that a copy is the same thing."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"
