"""What Triton loads: the folders, configs and manifest of a model repository."""

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from darkroom.process import is_alive
from darkroom_export.digest import file_sha256
from darkroom_export.errors import ExportError
from darkroom_export.lora_inputs import WeightSpec
from darkroom_export.networks import MAX_BATCH_SIZE, NetworkSpec, TensorSpec

MANIFEST = "manifest.json"
_DTYPES = {torch.float32: "TYPE_FP32", torch.int64: "TYPE_INT64"}


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


def write_python_models(repository: Path, networks: Iterable[str]) -> None:
    """Copy the engine, its other faces and the networks' runner, replacing older ones."""
    for config in sorted(templates().glob("*/config.pbtxt")):
        target = repository / config.parent.name
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(config.parent, target, ignore=_ignore_caches)
        for file in (templates() / "shared").glob("*.py"):
            shutil.copyfile(file, target / "1" / file.name)
    for network in networks:
        target = repository / network / "1"
        shutil.copyfile(templates() / "onnx_network" / "1" / "model.py", target / "model.py")


def write_network_model(repository: Path, spec: NetworkSpec) -> Path:
    """Write the config.pbtxt of a network; returns the path that its ONNX file takes."""
    version = repository / spec.name / "1"
    version.mkdir(parents=True)
    config = text_format.MessageToString(network_config(spec))
    (repository / spec.name / "config.pbtxt").write_text(config)
    return version / "model.onnx"


def network_config(spec: NetworkSpec) -> model_config_pb2.ModelConfig:
    """Triton's description of a network that runs as a Python model over ONNX Runtime."""
    config = model_config_pb2.ModelConfig(
        name=spec.name, backend="python", max_batch_size=MAX_BATCH_SIZE
    )
    for tensor in served_inputs(spec):
        _describe(config.input.add(optional=tensor.optional is not None), tensor)
    for tensor in spec.outputs:
        _describe(config.output.add(), tensor)
    config.instance_group.add(kind=model_config_pb2.ModelInstanceGroup.KIND_CPU, count=1)
    # The name is the ONNX Runtime backend's; 0 takes all cores.
    config.parameters["intra_op_thread_count"].string_value = "0"
    # An empty record is of an input that the runner knows by its name.
    optional = {tensor.name: dict(tensor.optional) for tensor in spec.inputs if tensor.optional}
    if optional:
        config.parameters["optional_inputs"].string_value = json.dumps(optional)
    return config


def served_inputs(spec: NetworkSpec) -> list[TensorSpec]:
    """Those that Triton sees: weights of adapters are read by what runs the graph."""
    return [tensor for tensor in spec.inputs if not isinstance(tensor, WeightSpec)]


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


def _describe(entry: Any, tensor: TensorSpec) -> None:
    entry.name = tensor.name
    entry.data_type = model_config_pb2.DataType.Value(_DTYPES[tensor.dtype])
    if tensor.shape:
        entry.dims.extend(size if isinstance(size, int) else -1 for size in tensor.shape)
    else:
        # Triton wants a dimension besides the batch; the network is to see none.
        entry.dims.append(1)
        entry.reshape.SetInParent()


def _ignore_caches(_: str, names: list[str]) -> set[str]:
    return {name for name in names if name == "__pycache__"}
