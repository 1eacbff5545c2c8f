"""LoRA files: fused into a checkpoint's weights, or added to a repository as adapters."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from google.protobuf import text_format
from safetensors.torch import save_file
from torch import nn
from tritonclient.grpc import model_config_pb2

from darkroom_export.backend import Backend
from darkroom_export.configs import MODEL_FILES
from darkroom_export.errors import ExportError
from darkroom_export.lora_file import DENOISERS, LoraContents, LoraLayer
from darkroom_export.lora_inputs import DOWN, UP, adaptable_layers, add_lora_inputs
from darkroom_export.repository import MANIFEST, hash_files, read_manifest
from darkroom_export.to_program import read_tensors

__all__ = [
    "AdapterRecord",
    "LoraFile",
    "add_adapters",
    "add_lora_inputs",
    "check_adapters",
    "convert_adapter",
    "load_and_fuse",
]

LORA_NAMES = "lora_names"
"""The parameter in config.pbtxt that tells the order of `lora_scale`'s columns."""
ADAPTERS = "adapters"
"""The folder of a network's adapters, beside its graph."""
MAX_SCALE = 10.0
_NETWORKS = (*DENOISERS, "text_encoder", "text_encoder_2", "text_encoder_3")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


@dataclass(frozen=True)
class LoraFile:
    """A LoRA and how much of it to take."""

    path: Path
    scale: float = 1.0


@dataclass(frozen=True)
class AdapterRecord:
    """An adapter as the manifest describes it."""

    rank: int
    networks: tuple[str, ...]
    sha256: str


def load_and_fuse(pipeline: Any, loras: Sequence[LoraFile]) -> tuple[str, ...]:
    """Add LoRAs to the weights of a pipeline; returns the networks that are others now.

    Raises:
        ExportError: a file is none, or does not fit in every layer; all weights are as they were.
    """
    layers = {
        name: _changeable_layers(network)
        for name in _NETWORKS
        if (network := getattr(pipeline, name, None)) is not None
    }
    shapes = {name: _weight_shapes(found) for name, found in layers.items()}
    changes = [(lora, _contents(lora).assign(shapes)) for lora in loras]
    touched = set()
    for lora, networks in changes:
        for network, changed in networks.items():
            touched.add(network)
            for path, change in changed.items():
                _add(layers[network][path].weight, change, lora.scale)
    return tuple(name for name in _NETWORKS if name in touched)


def convert_adapter(source: Path, module: nn.Module, target: Path) -> AdapterRecord:
    """Write a LoRA file as an adapter of a denoiser.

    Args:
        module: the denoiser, diffusers' own or one with LoRA inputs.

    Raises:
        ExportError: it changes something that an adapter cannot; nothing is written.
    """
    return _convert(source, _widths(adaptable_layers(module)), _kind(module), target)


def check_adapters(module: nn.Module, adapters: Mapping[str, Path]) -> None:
    """Refuse before a long export what `add_adapters` would refuse after it.

    Raises:
        ExportError: a name is none, or a file changes something that an adapter cannot.
    """
    widths = _widths(adaptable_layers(module))
    for name, source in adapters.items():
        _check_name(name)
        _read_adapter(source, widths, _kind(module))


def add_adapters(repository: Path, adapters: Mapping[str, Path]) -> None:
    """Add adapters by name to a repository whose denoiser was exported with LoRA inputs.

    Raises:
        ExportError: it was not, or an adapter does not fit; the repository is as it was.
    """
    manifest = read_manifest(repository)
    if manifest is None:
        raise ExportError(f"{repository}: is no model repository of ours")
    known = manifest.get("loras", {})
    for name in adapters:
        _check_name(name)
        if name in known:
            raise ExportError(f"{name}: {repository} has a LoRA of this name")
    written: dict[Path, bytes | None] = {}
    try:
        _add_adapters(repository, manifest, adapters, written)
    except OSError as error:
        _undo(written)
        raise ExportError(f"{error.filename}: {error.strerror}") from error
    except BaseException:
        _undo(written)
        raise


def _add_adapters(
    repository: Path,
    manifest: Mapping[str, Any],
    adapters: Mapping[str, Path],
    written: dict[Path, bytes | None],
) -> None:
    """Notes in `written` what each file held before it was written."""
    denoiser = manifest.get("denoiser", {}).get("network", "unet")
    # A variant's own takes the same adapters.
    variants = manifest.get("variants", {}).values()
    networks = [denoiser, *(names[denoiser] for names in variants if denoiser in names)]
    widths = _widths_of_network(repository / denoiser / "1")
    if not widths:
        raise ExportError(f"{repository}: {denoiser} was exported without LoRA inputs")
    records = dict(manifest.get("loras", {}))
    for name, source in adapters.items():
        files = [
            repository / network / "1" / ADAPTERS / f"{name}.safetensors" for network in networks
        ]
        for file in files:
            written[file] = None
            record = _convert(source, widths, denoiser, file)
        records[name] = {
            "rank": record.rank,
            "networks": list(record.networks),
            "files": hash_files(repository, files),
        }
    contents = {
        repository / network / "config.pbtxt": _with_names(repository / network, records)
        for network in networks
    }
    # Last, for it is what makes the others count.
    contents[repository / MANIFEST] = json.dumps({**manifest, "loras": records}, indent=1) + "\n"
    for path, content in contents.items():
        written[path] = path.read_bytes()
        _replace(path, content.encode())


def _check_name(name: str) -> None:
    if _NAME.fullmatch(name) is None:
        raise ExportError(
            f"{name!r}: is no name for a LoRA, allowed are 64 letters, digits, '.', '_' and '-'"
        )


def _contents(lora: LoraFile) -> LoraContents:
    # Written so that a scale that is not a number is refused too.
    if not -MAX_SCALE <= lora.scale <= MAX_SCALE:
        raise ExportError(
            f"{lora.path}: scale {lora.scale} is not allowed, {-MAX_SCALE:g} to {MAX_SCALE:g} are"
        )
    return LoraContents(lora.path)


def _changeable_layers(network: nn.Module) -> dict[str, Any]:
    return {
        path: module
        for path, module in network.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }


def _weight_shapes(layers: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {path: tuple(layer.weight.shape) for path, layer in layers.items()}


def _add(weight: torch.Tensor, change: LoraLayer, scale: float) -> None:
    delta = scale * (change.up @ change.down.flatten(1))
    with torch.no_grad():
        weight.copy_(weight.to(torch.float32) + delta.reshape(weight.shape))


def _widths(layers: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """In and out, by path."""
    return {path: (layer.weight.shape[1], layer.weight.shape[0]) for path, layer in layers.items()}


def _widths_of_network(version: Path) -> dict[str, tuple[int, int]]:
    """The same as an exported network tells it; empty if it has no LoRA inputs."""
    program = version / MODEL_FILES[Backend.TORCH]
    if program.exists():
        widths = read_tensors(program)["lora_widths"]
        return {path: (width_in, width_out) for path, (width_in, width_out) in widths.items()}
    return _widths_of_graph(version / MODEL_FILES[Backend.PYTHON])


def _widths_of_graph(path: Path) -> dict[str, tuple[int, int]]:
    try:
        graph = onnx.load(path, load_external_data=False).graph
    except Exception as error:  # protobuf's and the system's
        raise ExportError(f"{path}: {error}") from error
    shapes = {entry.name: entry.type.tensor_type.shape.dim for entry in graph.input}
    return {
        name.removesuffix(DOWN): (
            shape[1].dim_value,
            shapes[name.removesuffix(DOWN) + UP][0].dim_value,
        )
        for name, shape in shapes.items()
        if name.endswith(DOWN)
    }


def _kind(module: nn.Module) -> str:
    return "unet" if hasattr(module, "down_blocks") else "transformer"


def _read_adapter(
    source: Path, widths: Mapping[str, tuple[int, int]], network: str
) -> dict[str, LoraLayer]:
    contents = LoraContents(source)
    shapes = {path: (width_out, width_in) for path, (width_in, width_out) in widths.items()}
    try:
        return contents.assign({network: shapes})[network]
    except ExportError as error:
        raise ExportError(
            f"{error}; row by row, only attention and feed-forward layers of the {network} can be "
            "changed, other LoRAs have to be fused at the export (--lora, --fuse-lora)"
        ) from error


def _convert(
    source: Path, widths: Mapping[str, tuple[int, int]], network: str, target: Path
) -> AdapterRecord:
    layers = _read_adapter(source, widths, network)
    rank = max(layer.rank for layer in layers.values())
    tensors = {}
    for path, layer in layers.items():
        # All layers of an adapter share the columns of `lora_scale`.
        missing = rank - layer.rank
        down = nn.functional.pad(layer.down.flatten(1), (0, 0, 0, missing))
        tensors[f"{path}.down"] = down.contiguous()
        tensors[f"{path}.up"] = nn.functional.pad(layer.up, (0, missing)).contiguous()
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    try:
        save_file(tensors, partial, metadata={"rank": str(rank)})
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    (sha256,) = hash_files(target.parent, [target]).values()
    return AdapterRecord(rank, (network,), sha256)


def _with_names(model: Path, names: Mapping[str, Any]) -> str:
    """The config.pbtxt of a network, with the adapters' names in their order."""
    path = model / "config.pbtxt"
    config = text_format.Parse(path.read_text(), model_config_pb2.ModelConfig())
    config.parameters[LORA_NAMES].string_value = json.dumps(sorted(names))
    return str(text_format.MessageToString(config))


def _replace(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _undo(written: Mapping[Path, bytes | None]) -> None:
    """Put back what files held; those that were not there go again."""
    for path, content in written.items():
        if content is None:
            path.unlink(missing_ok=True)
            if path.parent.is_dir() and not any(path.parent.iterdir()):
                path.parent.rmdir()
        elif path.read_bytes() != content:
            _replace(path, content)
