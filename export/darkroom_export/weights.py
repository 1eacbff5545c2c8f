"""The files of a component's weights: found, whole, and of a known type."""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open

from darkroom_export.errors import ExportError, first_line

PICKLES = (".bin", ".ckpt", ".pt", ".pth")
"""Suffixes of files that can run code when they are read."""

_VARIANTS = (None, "fp16", "bf16")
"""In order of preference: many checkpoints of the hub come in half precision alone."""

_DTYPES = {
    "F64": torch.float32,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    # Exact in fp16.
    "F8_E4M3": torch.float16,
    "F8_E5M2": torch.float16,
}


class StoredTensor(NamedTuple):
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Weights:
    """One component's weights, and what diffusers and transformers must be told to load them."""

    variant: str | None
    dtype: torch.dtype


def find_weights(folder: Path, stem: str) -> Weights:
    """Find and check the .safetensors files of a component: one, or several with an index.

    Args:
        stem: what the library calls its files, "model" or "diffusion_pytorch_model".

    Raises:
        ExportError: there are none, one is missing or broken, or there are only pickles.
    """
    for variant in _VARIANTS:
        infix = f".{variant}" if variant else ""
        index = folder / f"{stem}.safetensors.index{infix}.json"
        file = folder / f"{stem}{infix}.safetensors"
        if index.is_file():
            files = _shards(index)
        elif file.is_file():
            files = [file]
        else:
            continue
        tensors = [tensor for file in files for tensor in read_header(file).values()]
        return Weights(variant, stored_dtype(folder, tensors))
    refuse_pickles(folder)
    raise ExportError(f"{folder / stem}.safetensors: no such file")


def refuse_pickles(folder: Path) -> None:
    """Raises ExportError if the folder holds weights, but as pickles."""
    pickles = sorted(file for file in folder.glob("*") if file.suffix in PICKLES)
    if pickles:
        raise ExportError(pickle_refusal(pickles[0]))


def pickle_refusal(file: Path) -> str:
    return (
        f"{file}: is a pickle, which can run code when it is read; convert it to safetensors "
        "first: load it with diffusers where that does no harm, and save_pretrained(FOLDER)"
    )


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a .safetensors file by name, without their values.

    Raises:
        ExportError: it is missing, cut off, or no such file.
    """
    try:
        with safe_open(file, framework="pt") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118  no dict
            return {
                name: StoredTensor(part.get_dtype(), tuple(part.get_shape()))
                for name, part in slices.items()
            }
    except Exception as error:  # safetensors raises many kinds
        raise ExportError(f"{file}: {first_line(error)}") from error


def stored_dtype(where: Path, tensors: Iterable[StoredTensor]) -> torch.dtype:
    """The smallest type that holds all weights exactly.

    Raises:
        ExportError: there is nothing but integers.
    """
    kinds = {_DTYPES[tensor.dtype] for tensor in tensors if tensor.dtype in _DTYPES}
    if not kinds:
        raise ExportError(f"{where}: has no floating-point weights")
    return kinds.pop() if len(kinds) == 1 else torch.float32


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Modules that are made inside have weights of this type."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ExportError: the file is missing or malformed.
    """
    try:
        values = json.loads(file.read_text())
    except FileNotFoundError:
        raise ExportError(f"{file}: no such file") from None
    except (OSError, ValueError) as error:
        raise ExportError(f"{file}: malformed, {first_line(error)}") from None
    if not isinstance(values, dict):
        raise ExportError(f"{file}: malformed, not a JSON object")
    return values


def _shards(index: Path) -> list[Path]:
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ExportError(f"{index}: malformed, has no weight_map")
    files = [index.parent / str(name) for name in sorted(set(names.values()))]
    for file in files:
        if not file.is_file():
            raise ExportError(f"{file}: no such file, but {index.name} names it")
    return files
