"""What Triton loads: the folders, configs and manifest of a model repository."""

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from darkroom.process import is_alive
from darkroom_export.backend import Backend
from darkroom_export.configs import (
    CONFIG,
    DEFAULT_OPTIONS,
    MODEL_FILES,
    Description,
    Options,
    config_text,
    native_config,
)
from darkroom_export.digest import file_sha256
from darkroom_export.errors import ExportError
from darkroom_export.networks import NetworkSpec

MANIFEST = "manifest.json"
ENGINE = "stable_diffusion"
_MAX_ROWS = re.compile(r'(key: "max_rows" value \{ string_value: ")(\d+)')
_RUNNERS = {Backend.PYTHON: "onnx_network", Backend.TORCH: "torch_network"}
"""The Python models that run networks, for the backends that are ours."""


def templates() -> Path:
    """The Python models that a repository is made from: packaged, or in a checkout."""
    packaged = Path(__file__).parent / "model_repository"
    return packaged if packaged.is_dir() else Path(__file__).parents[2] / "model_repository"


@contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """A folder to write in that becomes `target` at the end, all at once, or not at all.

    What stood at `target` stays until then. The folder lies beside it, so that a killed export
    leaves something that no server loads, and that the next export removes.
    """
    target = target.absolute()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ExportError(f"{target}: {error.strerror}") from error
    _remove_leftovers(target)
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        replaced = target.with_name(f".{target.name}.replaced-{os.getpid()}")
        if target.exists():
            target.rename(replaced)
        partial.rename(target)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _remove_leftovers(target: Path) -> None:
    """Remove what killed exports left beside `target`, and put back what they had moved away."""
    name = re.compile(rf"\.{re.escape(target.name)}\.(partial|replaced)-(\d+)")
    for entry in list(target.parent.iterdir()):
        match = name.fullmatch(entry.name)
        if match is None or is_alive(int(match[2])):
            continue
        if match[1] == "replaced" and not target.exists():
            entry.rename(target)
        else:
            shutil.rmtree(entry)


def write_python_models(repository: Path, manifest: Mapping[str, Any]) -> None:
    """Copy the engine, its other faces and the networks' runners, replacing older ones.

    A network that Triton itself runs has no runner.
    """
    for config in sorted(templates().glob(f"*/{CONFIG}")):
        target = repository / config.parent.name
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(config.parent, target, ignore=_ignore_caches)
        _copy_files(templates() / "shared", target / "1")
    networks = manifest["networks"]
    for name, record in networks.items():
        _write_runner(repository / name / "1", Backend(record["backend"]))
    denoiser = networks[manifest["denoiser"]["network"]]
    _limit_rows(repository / ENGINE / CONFIG, denoiser["max_batch_size"])


def write_network_model(
    repository: Path, spec: NetworkSpec, options: Options = DEFAULT_OPTIONS
) -> Path:
    """Write the config.pbtxt of a network; returns the path that its file takes.

    Args:
        options: of the backend that is to run it.

    Raises:
        ExportError: the backend cannot run it.
    """
    version = repository / spec.name / "1"
    version.mkdir(parents=True)
    config = native_config(Description.from_spec(spec), options)
    (repository / spec.name / CONFIG).write_text(config_text(config))
    return version / MODEL_FILES[options.backend]


def write_manifest(repository: Path, manifest: dict[str, Any]) -> None:
    (repository / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")


def read_manifest(repository: Path) -> dict[str, Any] | None:
    """The manifest of a repository, or None where there is none.

    Raises:
        ExportError: it is there but cannot be read.
    """
    path = repository / MANIFEST
    if not path.exists():
        return None
    try:
        manifest = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ExportError(f"{path}: {error}") from None
    if not isinstance(manifest, dict):
        raise ExportError(f"{path}: not a JSON object")
    return manifest


def hash_files(repository: Path, files: list[Path]) -> dict[str, str]:
    """SHA-256 by path relative to the repository."""
    return {str(file.relative_to(repository)): file_sha256(file) for file in files}


def _write_runner(version: Path, backend: Backend) -> None:
    """Put the Python model of a backend beside its network, and take away what is there of others.

    What runs the network is replaced as one: helpers of an older runner may be no part of this one.
    """
    for file in version.glob("*.py"):
        file.unlink()
    if runner := _RUNNERS.get(backend):
        _copy_files(templates() / runner / "1", version)
        _copy_files(templates() / "shared", version)


def _limit_rows(config: Path, most: int) -> None:
    """Let the engine make no larger calls than its denoiser was built for."""

    def limited(match: re.Match[str]) -> str:
        return f"{match[1]}{min(int(match[2]), most)}"

    text, num_found = _MAX_ROWS.subn(limited, config.read_text())
    if num_found != 1:
        raise ValueError(f"{config}: max_rows stands there {num_found} times")
    config.write_text(text)


def _copy_files(source: Path, target: Path) -> None:
    for file in source.glob("*.py"):
        shutil.copyfile(file, target / file.name)


def _ignore_caches(_: str, names: list[str]) -> set[str]:
    return {name for name in names if name == "__pycache__"}
