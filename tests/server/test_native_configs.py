"""Configs for Triton's own backends, which this server lacks: its core takes them all the same."""

import contextlib
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tritonclient.grpc
from serving import WAIT_S, wait_until
from tritonclient.utils import InferenceServerException

from darkroom import Client
from darkroom.distribution import Distribution
from darkroom.server import Server, free_ports


class Range(NamedTuple):
    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]


PROFILE = {
    "sample": Range((1, 4, 8, 8), (8, 4, 16, 16), (16, 4, 32, 32)),
    "timestep": Range((1,), (8,), (16,)),
    "encoder_hidden_states": Range((1, 77, 96), (8, 77, 96), (16, 154, 96)),
}


@contextlib.contextmanager
def triton(models: Path, folder: Path) -> Iterator[tritonclient.grpc.InferenceServerClient]:
    """A server that has loaded nothing."""
    distribution, ports = Distribution.find(), free_ports()
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [
                str(distribution.binary),
                f"--model-repository={models}",
                f"--backend-directory={distribution.backend_directory(folder / 'backends')}",
                f"--http-port={ports.http}",
                f"--grpc-port={ports.grpc}",
                f"--metrics-port={ports.metrics}",
                "--disable-auto-complete-config",
                "--model-control-mode=explicit",
            ],
            env=distribution.environment(),
            stdout=log,
            stderr=log,
        )

    def is_ready() -> bool:
        assert process.poll() is None, (folder / "log").read_text()
        with contextlib.suppress(InferenceServerException):
            return client.is_server_ready()
        return False

    try:
        with tritonclient.grpc.InferenceServerClient(f"127.0.0.1:{ports.grpc}") as client:
            wait_until(is_ready)
            yield client
    finally:
        process.kill()
        process.wait()


def native_configs(repository: Path) -> Mapping[str, tuple[str, Any]]:
    """By the name of a model: the backend, and a config for the repository's UNet."""
    from darkroom_export.configs import (
        Description,
        OnnxRuntimeOptions,
        TensorRtOptions,
        native_config,
        read_config,
    )

    options = {
        "onnxruntime_cpu": OnnxRuntimeOptions(is_on_gpu=False),
        "onnxruntime_cuda": OnnxRuntimeOptions(gpus=(0, 1)),
        "onnxruntime_tensorrt": OnnxRuntimeOptions(
            accelerator="tensorrt", profile=PROFILE, engine_cache="/engines", is_half=True
        ),
        "tensorrt": TensorRtOptions([PROFILE]),
        "tensorrt_graphs": TensorRtOptions([PROFILE], gpus=(0, 1), graph_batches=(1, 2, 4, 8)),
    }
    unet = Description.from_config(read_config(repository / "unet"))
    return {
        name: (str(it.backend), native_config(replace(unet, name=name), it))
        for name, it in options.items()
    }


def test_the_core_takes_every_config_and_misses_the_backend_alone(
    repository: Path, tmp_path: Path
) -> None:
    from darkroom_export.configs import config_text

    models = tmp_path / "models"
    configs = native_configs(repository)
    texts = {name: config_text(config) for name, (_, config) in configs.items()}
    for name, text in (
        *texts.items(),
        ("broken", texts["tensorrt_graphs"].replace("graph_lower_bound", "graph_bound")),
    ):
        (models / name / "1").mkdir(parents=True)
        (models / name / "config.pbtxt").write_text(text.replace("tensorrt_graphs", name))

    with triton(models, tmp_path) as client:
        for name, (backend, _) in configs.items():
            missing = f"unable to find backend library for backend '{backend}'"
            with pytest.raises(InferenceServerException, match=missing):
                client.load_model(name)
        # A config that it cannot read is another thing.
        with pytest.raises(InferenceServerException, match="failed to poll from model repository"):
            client.load_model("broken")
        assert 'has no field named "graph_bound"' in (tmp_path / "log").read_text()


STAND_IN = '''
"""Stands where Triton's ONNX Runtime backend would: takes what that takes, and nothing else."""

import json
from pathlib import Path

import onnxruntime
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        config = json.loads(args["model_config"])
        assert config["default_model_filename"] == "model.onnx"
        # What that backend refuses.
        assert not [entry["name"] for entry in config["input"] if entry["optional"]]
        path = Path(args["model_repository"]) / args["model_version"] / "model.onnx"
        self.session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        names = [entry["name"] for entry in config["input"]]
        assert sorted(names) == sorted(entry.name for entry in self.session.get_inputs())

    def execute(self, requests):
        return [self.run(request) for request in requests]

    def run(self, request):
        wanted = request.requested_output_names()
        feed = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        made = self.session.run(wanted, feed)
        pairs = zip(wanted, made)
        return pb_utils.InferenceResponse([pb_utils.Tensor(name, it) for name, it in pairs])
'''


@pytest.fixture
def with_stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tritonserver that has a backend of that name."""
    monkeypatch.delenv("DARKROOM_TRITONSERVER", raising=False)
    found = Distribution.find()
    root = tmp_path / "tritonserver"
    python = root / "backends" / "python"
    python.mkdir(parents=True)
    for file in (found.root / "backends" / "python").iterdir():
        # The core follows no links out of here where it looks for what runs another backend.
        if file.suffix == ".so":
            shutil.copy(file, python)
        elif file.is_file():
            (python / file.name).symlink_to(file)
    (python / found.stub.name).unlink(missing_ok=True)
    (python / found.stub.name).symlink_to(found.stub)
    (root / "backends" / "onnxruntime").mkdir()
    (root / "backends" / "onnxruntime" / "model.py").write_text(STAND_IN)
    for folder in ("bin", "caches", "lib"):
        if (found.root / folder).is_dir():
            (root / folder).symlink_to(found.root / folder)
    monkeypatch.setenv("DARKROOM_TRITONSERVER", str(root))


@pytest.mark.usefixtures("with_stand_in")
def test_the_engine_calls_networks_of_a_native_backend(
    repository: Path, client: Client, tmp_path: Path
) -> None:
    from darkroom_export.repository import read_manifest, write_manifest, write_python_models

    copy = tmp_path / "repository"
    shutil.copytree(repository, copy)
    manifest = read_manifest(copy)
    for name, record in manifest["networks"].items():
        make_native(copy / name)
        record["backend"] = "onnxruntime"
    write_python_models(copy, manifest)
    write_manifest(copy, manifest)
    assert not list((copy / "unet" / "1").glob("*.py"))
    request = {"prompt": "a large red circle", "seed": 1, "num_inference_steps": 4}
    expected = client.generate(**request)

    with (
        Server(copy, free_ports()) as server,
        Client(server.grpc_url, timeout=WAIT_S) as native,
    ):
        made = native.generate(**request)
    # The files differ: they name the export that they were made by.
    assert made.tobytes() == expected.tobytes()


def make_native(model: Path) -> None:
    """Give an exported network the config for the ONNX Runtime backend."""
    from darkroom_export.config_check import check_config
    from darkroom_export.configs import (
        Description,
        OnnxRuntimeOptions,
        config_text,
        native_config,
        read_config,
    )

    description = Description.from_config(read_config(model))
    config = native_config(description, OnnxRuntimeOptions(is_on_gpu=False))
    check_config(config, model / "1" / "model.onnx")
    (model / "config.pbtxt").write_text(config_text(config))
