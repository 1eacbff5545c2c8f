"""A checkpoint without its weights: what its configs alone tell of its networks."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
import transformers
from torch import nn

from darkroom_export.checkpoint import PIPELINES, family_of, is_present, read_index
from darkroom_export.errors import ExportError, first_line
from darkroom_export.families import FAMILIES, Family
from darkroom_export.quiet import quieten
from darkroom_export.random_checkpoint import ARCHITECTURES, Architecture, make_part
from darkroom_export.weights import read_json

META = torch.device("meta")
"""PyTorch's device of tensors that have a shape and a type, but no memory."""
_NETWORKS = (
    *("text_encoder", "text_encoder_2", "text_encoder_3"),
    *("unet", "transformer", "vae"),
)


@dataclass(frozen=True)
class Skeleton:
    """A checkpoint whose networks have shapes, but no numbers."""

    source: str
    family_name: str
    pipeline: Any
    """Holds the networks by diffusers' names, None where there is none; it cannot be run."""

    @property
    def family(self) -> Family:
        return FAMILIES[self.family_name]


def load_skeleton(source: str) -> Skeleton:
    """Read a diffusers folder, of which no weights are needed, or take a known architecture.

    Raises:
        ExportError: there is no such thing, or it is of a family that is not supported.
    """
    quieten()
    folder = Path(source)
    if folder.is_dir():
        if (folder / "manifest.json").is_file():
            raise ExportError(
                f"{source}: is an exported repository; a plan is made of the checkpoint that it "
                "came from"
            )
        return _of_folder(source, folder)
    if source in ARCHITECTURES:
        return _of_architecture(source, ARCHITECTURES[source])
    raise ExportError(
        f"{source}: neither a diffusers folder nor an architecture, of which there are "
        f"{', '.join(_architectures())}"
    )


def _of_folder(source: str, folder: Path) -> Skeleton:
    index = read_index(folder)
    networks: dict[str, Any] = {}
    for part in PIPELINES[index["_class_name"]]:
        if is_present(folder, index, part) and part.name in _NETWORKS:
            networks[part.name] = _read_network(folder / part.name, part.classes[0])
    return _skeleton(source, index["_class_name"], networks, index)


def _read_network(folder: Path, class_name: str) -> nn.Module:
    config = read_json(folder / "config.json")
    try:
        if hasattr(transformers, class_name):
            kind = getattr(transformers, class_name)
            read = kind.config_class.from_pretrained(folder, local_files_only=True)
            with META:
                return _without_numbers(kind(read))
        with META:
            return _without_numbers(getattr(diffusers, class_name).from_config(config))
    except Exception as error:  # diffusers and transformers raise many kinds
        raise ExportError(f"{folder / 'config.json'}: {first_line(error)}") from error


def _of_architecture(source: str, architecture: Architecture) -> Skeleton:
    if architecture.pipeline is None:
        raise ExportError(f"{source}: is one component, not a checkpoint")
    with META:
        networks = {
            name: _without_numbers(make_part(part))
            for name, part in architecture.parts.items()
            if name in _NETWORKS
        }
    return _skeleton(source, architecture.pipeline, networks, architecture.index)


def _architectures() -> Iterator[str]:
    return (name for name, it in ARCHITECTURES.items() if it.pipeline is not None)


def _without_numbers(module: nn.Module) -> nn.Module:
    # Tables that are computed with NumPy are in memory still.
    return module.to(META).eval()


def _skeleton(
    source: str, class_name: str, networks: dict[str, Any], options: Mapping[str, Any]
) -> Skeleton:
    parts = {name: networks.get(name) for name in _NETWORKS}
    family = family_of(Path(source), class_name, parts, options)
    return Skeleton(source, family, SimpleNamespace(**parts))
