"""The Python models, loaded as Triton loads them: by path, beside the fake of Triton's module."""

import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import triton_python_backend_utils as pb_utils
from engine_harness import (  # noqa: F401  fixtures are found by name
    manifest,
    manifest_document,
    repository,
)
from google.protobuf import json_format, text_format
from tritonclient.grpc import model_config_pb2

MODELS = Path(__file__).parents[2] / "model_repository"


@pytest.fixture
def server() -> Iterator[pb_utils.Server]:
    """What stands behind the fake `pb_utils`, empty."""
    pb_utils.server.reset()
    yield pb_utils.server
    assert pb_utils.server.num_crashes == 0
    pb_utils.server.reset()


@pytest.fixture(scope="session")
def load_model() -> Callable[[str], ModuleType]:
    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(f"{name}_model", MODELS / name / "1/model.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def engine_config() -> Any:
    """The real config.pbtxt of `stable_diffusion`."""
    text = (MODELS / "stable_diffusion" / "config.pbtxt").read_text()
    return text_format.Parse(text, model_config_pb2.ModelConfig())


@pytest.fixture(scope="session")
def as_triton_tells_it() -> Callable[[Any], str]:
    """A config as the JSON that Triton hands to `initialize`."""

    def convert(config: Any) -> str:
        return json.dumps(json_format.MessageToDict(config, preserving_proto_field_name=True))

    return convert


@pytest.fixture
def load_network(
    load_model: Callable[[str], ModuleType], as_triton_tells_it: Callable[[Any], str]
) -> Callable[[str], Callable[..., Any]]:
    """What initializes the runner of that name over a network's folder."""

    def load_network(name: str) -> Callable[..., Any]:
        def load(folder: Path, made: Any, **parameters: str) -> Any:
            for key, value in parameters.items():
                made.parameters[key].string_value = value
            model = load_model(name).TritonPythonModel()
            arguments = {"model_config": as_triton_tells_it(made), "model_version": "1"}
            model.initialize(arguments | {"model_repository": str(folder)})
            return model

        return load

    return load_network
