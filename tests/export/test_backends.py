"""Networks as programs of PyTorch: in every family, compared as ONNX is, and told apart from it."""

import json
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from google.protobuf import text_format
from safetensors.torch import save_file
from torch import nn
from tritonclient.grpc import model_config_pb2

from darkroom_engine import Manifest
from darkroom_export import Backend, ExportError, Precision, export_checkpoint
from darkroom_export.checkpoint import find_checkpoint, load_checkpoint
from darkroom_export.device import find_device
from darkroom_export.families import FAMILIES
from darkroom_export.lora_inputs import lora_widths
from darkroom_export.networks import TOLERANCE, InputShape, NetworkSpec, TensorSpec, network_specs
from darkroom_export.repository import templates
from darkroom_export.runner import open_network
from darkroom_export.to_program import export_program, read_tensors
from darkroom_export.verify import (
    allowed_error,
    input_shapes,
    network_reference,
    verify_network,
)
from darkroom_settings import TorchSettings

RANK = 4
WIDTH = 32
ADAPTED = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
NETWORKS = ("text_encoder", "unet", "vae_decoder", "vae_encoder", "controlnet_edges")


@pytest.fixture(scope="module")
def ink(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA for one layer of the UNet."""
    path = tmp_path_factory.mktemp("loras") / "ink.safetensors"
    down, up = torch.randn(RANK, WIDTH), torch.randn(WIDTH, RANK)
    key = f"unet.{ADAPTED}"
    save_file({f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}, path)
    return path


@pytest.fixture(scope="module")
def repository(
    checkpoint: Path,
    make_checkpoint: Callable[[str], Path],
    ink: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Stable Diffusion 1.5 with a ControlNet and an adapter, for PyTorch, in bf16."""
    target = tmp_path_factory.mktemp("torch") / "repository"
    assert export_checkpoint(
        str(checkpoint),
        target,
        backend=Backend.TORCH,
        precision=Precision.BF16,
        controlnets={"edges": str(make_checkpoint("tiny-sd15-controlnet"))},
        loras={"ink": str(ink)},
    )
    return target


def manifest_of(path: Path) -> dict[str, Any]:
    return json.loads((path / "manifest.json").read_text())


def program_of(path: Path, network: str) -> Path:
    return path / network / "1" / "model.pt2"


def test_the_manifest_says_what_runs_each_network(repository: Path) -> None:
    manifest = manifest_of(repository)

    assert (manifest["backend"], manifest["identity"]["backend"]) == ("torch", "torch")
    assert tuple(manifest["networks"]) == NETWORKS
    for name, record in manifest["networks"].items():
        assert (record["backend"], record["precision"]) == ("torch", "bf16")
        assert f"{name}/1/model.pt2" in record["files"]
    engine = Manifest.load(repository / "manifest.json")
    assert {network.backend for network in engine.networks.values()} == {"torch"}


def test_every_program_was_compared_with_pytorch(repository: Path) -> None:
    manifest = manifest_of(repository)

    for record in manifest["networks"].values():
        verification = record["verification"]
        assert 0 < verification["error"] <= verification["tolerance"] == TOLERANCE[Precision.BF16]
        assert list(verification["errors"]) == record["outputs"]
        assert {shapes[0][0] for shapes in verification["input_shapes"]} == {1, 2, 3, 5}
    assert 0 < manifest["verification"]["error"] <= manifest["verification"]["tolerance"]


@pytest.mark.parametrize("network", NETWORKS)
def test_a_program_names_its_tensors_as_its_config_does(repository: Path, network: str) -> None:
    text = (repository / network / "config.pbtxt").read_text()
    config = text_format.Parse(text, model_config_pb2.ModelConfig())
    tensors = read_tensors(program_of(repository, network))
    weights = {
        layer + end for layer in tensors["lora_widths"] for end in (".lora_down", ".lora_up")
    }

    assert config.backend == "python"
    served = [name for name in tensors["inputs"] if name not in weights]
    assert [entry.name for entry in config.input] == served
    assert [entry.name for entry in config.output] == tensors["outputs"]
    assert tensors["allow_tf32"] is True, "which bf16 does not exclude"
    parameters = {key: entry.string_value for key, entry in config.parameters.items()}
    assert {"device", "compile", "cuda_graphs", "row_buckets"} <= set(parameters)
    assert TorchSettings.from_parameters(parameters) == TorchSettings()
    assert ("optional_inputs" in parameters) == (network == "unet")


def test_the_runner_of_programs_lies_beside_them(repository: Path) -> None:
    runner = templates() / "torch_network" / "1" / "model.py"

    assert (repository / "unet" / "1" / "model.py").read_bytes() == runner.read_bytes()


def test_adapters_lie_beside_a_program_that_takes_them(repository: Path) -> None:
    config = (repository / "unet" / "config.pbtxt").read_text()
    tensors = read_tensors(program_of(repository, "unet"))

    assert manifest_of(repository)["loras"]["ink"]["rank"] == RANK
    assert (repository / "unet" / "1" / "adapters" / "ink.safetensors").is_file()
    assert '"ink' in config.replace("\\", "")
    assert tensors["lora_widths"][ADAPTED] == [WIDTH, WIDTH]
    assert read_tensors(program_of(repository, "vae_decoder"))["lora_widths"] == {}


def test_a_row_takes_its_own_share_of_an_adapter(repository: Path) -> None:
    path = program_of(repository, "unet")
    run = open_network(path)
    rng = np.random.default_rng(0)
    tensors = read_tensors(path)
    shapes = {
        "sample": (1, 4, 16, 16),
        "timestep": (1,),
        "encoder_hidden_states": (1, 77, WIDTH),
        **{
            name: (RANK, tensors["lora_widths"][name.removesuffix(".lora_down")][0])
            for name in tensors["inputs"]
            if name.endswith(".lora_down")
        },
        **{
            name: (tensors["lora_widths"][name.removesuffix(".lora_up")][1], RANK)
            for name in tensors["inputs"]
            if name.endswith(".lora_up")
        },
    }
    row = {name: 0.3 * rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    for name in tensors["inputs"]:
        if "block_res_sample" in name:
            row[name] = np.zeros((1, *_residual_shape(repository, name)), np.float32)
    two = {name: row[name] if "lora_" in name else np.repeat(row[name], 2, 0) for name in row}
    (alone,) = run({**row, "lora_scale": np.zeros((1, RANK), np.float32)}, ["out_sample"])
    scale = np.array([[0] * RANK, [1] * RANK], np.float32)
    (both,) = run({**two, "lora_scale": scale}, ["out_sample"])

    largest = np.abs(alone).max()
    assert np.abs(both[0] - alone[0]).max() < 0.05 * largest
    assert np.abs(both[1] - alone[0]).max() > 0.05 * largest


def _residual_shape(repository: Path, name: str) -> tuple[int, int, int]:
    residuals = manifest_of(repository)["denoiser"]["residuals"]
    (residual,) = [it for it in residuals if it["name"] == name]
    side = 16 // residual["divisor"]
    return residual["channels"], side, side


def test_an_export_is_up_to_date_only_for_its_own_backend(
    repository: Path, checkpoint: Path, make_checkpoint: Callable[[str], Path], ink: Path
) -> None:
    def export(backend: Backend) -> bool:
        return export_checkpoint(
            str(checkpoint),
            repository,
            backend=backend,
            precision=Precision.BF16 if backend is Backend.TORCH else Precision.FP16,
            controlnets={"edges": str(make_checkpoint("tiny-sd15-controlnet"))},
            loras={"ink": str(ink)},
        )

    assert export(Backend.TORCH) is False
    with pytest.raises(ExportError, match=r"in bf16, made from .* with other options"):
        export(Backend.PYTHON)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        (
            {"precision": Precision.BF16},
            "precision: bf16 needs the backend torch; allowed with python are fp32, fp16",
        ),
        ({"backend": Backend.TENSORRT}, "backend: tensorrt is not exported to, but python or torc"),
        ({"device": "gpu"}, "device: 'gpu' is none, allowed are cpu, cuda"),
    ],
)
def test_a_choice_that_is_none_is_refused_by_name(
    checkpoint: Path, tmp_path: Path, choices: dict[str, Any], message: str
) -> None:
    with pytest.raises(ExportError, match=message):
        export_checkpoint(str(checkpoint), tmp_path / "target", **choices)
    assert list(tmp_path.iterdir()) == []


def test_a_gpu_that_is_not_there_is_refused() -> None:
    if torch.cuda.is_available():
        assert find_device("cuda").type == "cuda"
        return
    with pytest.raises(ExportError, match="device: 'cuda' is asked for, but PyTorch sees no GPU"):
        find_device("cuda")


@pytest.fixture(scope="module")
def specs_of(make_checkpoint: Callable[[str], Path]) -> Callable[..., Any]:
    """The pipeline, the family and the networks of an architecture, by name."""

    def specs_of(architecture: str) -> Any:
        checkpoint = load_checkpoint(find_checkpoint(str(make_checkpoint(architecture))))
        family = FAMILIES[checkpoint.family]
        specs = network_specs(checkpoint.pipeline, family)
        return checkpoint.pipeline, family, {spec.name: spec for spec in specs}

    return specs_of


@pytest.mark.parametrize(
    ("architecture", "network", "precision"),
    [
        ("tiny-sdxl", "unet", Precision.FP16),
        ("tiny-sd3", "transformer", Precision.BF16),
        ("tiny-sd3", "text_encoder_3", Precision.FP32),
    ],
)
def test_networks_of_other_families_become_programs(
    specs_of: Callable[..., Any],
    tmp_path: Path,
    architecture: str,
    network: str,
    precision: Precision,
) -> None:
    pipeline, family, specs = specs_of(architecture)
    reference = network_reference(specs[network], input_shapes(pipeline, family)[:2], 3)
    (path,) = export_program(specs[network], precision, tmp_path / "model.pt2")
    # Not the device that it was exported on, though it is the same here.
    elsewhere = torch.device("cpu:0")
    record = verify_network(specs[network], reference, path, precision, elsewhere)

    assert record["error"] <= record["tolerance"] == TOLERANCE[precision]
    assert read_tensors(path)["lora_widths"] == lora_widths(specs[network]) == {}


class _Scaled(nn.Module):
    """A network of one number."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        return (self.factor * sample.to(self.factor.dtype)).float()


class _Undecided(nn.Module):
    """Its code goes by its input's values, which no program can."""

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        return sample if float(sample.sum()) > 0 else -sample


def spec_of(module: nn.Module) -> NetworkSpec:
    tensors = {
        name: TensorSpec(name, torch.float32, (4, "height", "width"))
        for name in ("sample", "out_sample")
    }
    return NetworkSpec(
        "unet", module, (tensors["sample"],), (tensors["out_sample"],), tolerance=TOLERANCE
    )


@pytest.mark.parametrize(
    ("factor", "precision", "message"),
    [
        (2.01, Precision.FP32, "unet: out_sample of model.pt2 in fp32 differs from PyTorch's by 5"),
        (2.3, Precision.BF16, "unet: out_sample of model.pt2 in bf16 differs from PyTorch's by 1"),
        (1e6, Precision.FP16, "unet: out_sample is not finite, the precision may be too low"),
        (float("nan"), Precision.FP32, "unet: out_sample is not finite"),
    ],
)
def test_a_program_that_computes_something_else_is_found(
    tmp_path: Path, factor: float, precision: Precision, message: str
) -> None:
    reference = network_reference(spec_of(_Scaled(2.0)), [InputShape(2, 4, 4)], 1)
    spec = spec_of(_Scaled(factor))
    (path,) = export_program(spec, precision, tmp_path / "model.pt2")

    with pytest.raises(ExportError, match=message):
        verify_network(spec, reference, path, precision)


@pytest.mark.parametrize(
    ("device", "name", "precision", "as_of"),
    [
        ("cuda", "model.pt2", Precision.FP16, Precision.FP16),
        ("cuda", "model.pt2", Precision.BF16, Precision.FP16),
        ("cuda", "model.pt2", Precision.FP32, Precision.FP32),
        # ONNX Runtime runs on the CPU in any case.
        ("cuda", "model.onnx", Precision.FP16, Precision.FP32),
        ("cpu", "model.pt2", Precision.FP16, Precision.FP32),
    ],
)
def test_a_network_kept_in_float32_may_be_off_by_what_tf32_cuts_off(
    device: str, name: str, precision: Precision, as_of: Precision
) -> None:
    kept = replace(spec_of(_Scaled(2.0)), float32_parts=("",))

    assert allowed_error(kept, precision, Path(name), torch.device(device)) == TOLERANCE[as_of]


def test_a_network_that_cannot_be_a_program_is_named(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="unet: export to a program of PyTorch failed, "):
        export_program(spec_of(_Undecided()), Precision.FP32, tmp_path / "model.pt2")


def test_a_file_that_is_no_program_is_refused_by_name(tmp_path: Path) -> None:
    missing, broken, other = (tmp_path / name for name in ("missing", "broken", "other"))
    broken.write_text("no archive")
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("model/data.json", "{}")

    for path, message in (
        (missing, "missing: .*No such file"),
        (broken, "broken: File is not a zip file"),
        (other, "other: has no tensors.json, and is no network of ours"),
    ):
        with pytest.raises(ExportError, match=message):
            read_tensors(path)
