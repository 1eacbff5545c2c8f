"""Copies of a model repository with other settings, for what is measured under each."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

Parameters = Mapping[str, Mapping[str, int]]
"""Values of config.pbtxt's `parameters`, by model and key."""


@contextlib.contextmanager
def repository_with(repository: Path, parameters: Parameters) -> Iterator[Path]:
    """A copy with these parameters, which shares the networks' files, and is removed at the end.

    Raises:
        ValueError: a model has no such parameter.
    """
    with tempfile.TemporaryDirectory(prefix="darkroom-bench-") as scratch:
        copy = Path(scratch) / repository.name
        shutil.copytree(
            repository,
            copy,
            copy_function=_copy,
            ignore=shutil.ignore_patterns("__pycache__"),
        )
        for model, values in parameters.items():
            set_parameters(copy / model / "config.pbtxt", values)
        yield copy


def set_parameters(path: Path, values: Mapping[str, int]) -> None:
    """Change parameters of a config.pbtxt.

    Raises:
        ValueError: there is no such parameter.
    """
    config = text_format.Parse(path.read_text(), model_config_pb2.ModelConfig())
    for key, value in values.items():
        if key not in config.parameters:
            raise ValueError(f"{path}: no parameter {key}; there are {sorted(config.parameters)}")
        config.parameters[key].string_value = str(value)
    path.write_text(text_format.MessageToString(config))


def _copy(source: str, target: str) -> str:
    # Only what nobody edits is shared: an export that goes on meanwhile replaces the other files.
    if source.endswith((".onnx", ".onnx.data", ".plan")):
        with contextlib.suppress(OSError):  # another file system
            os.link(source, target)
            return target
    return str(shutil.copy2(source, target))
