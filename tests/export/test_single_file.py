"""A single file in the original layout exports to the networks that the diffusers folder gives."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from darkroom_export import ExportError, export_checkpoint
from darkroom_export.checkpoint import find_checkpoint, load_checkpoint


@pytest.fixture(scope="session")
def v_prediction_config(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The architecture alone, without weights, and with another scheduler."""
    folder = tmp_path_factory.mktemp("config")
    for path in checkpoint.rglob("*"):
        if path.suffix in (".json", ".txt"):
            copied = folder / path.relative_to(checkpoint)
            copied.parent.mkdir(exist_ok=True)
            copied.write_bytes(path.read_bytes())
    scheduler = folder / "scheduler" / "scheduler_config.json"
    facts = {**json.loads(scheduler.read_text()), "prediction_type": "v_prediction"}
    scheduler.write_text(json.dumps(facts))
    return folder


@pytest.fixture(scope="session")
def from_single_file(
    single_file: Path, v_prediction_config: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    target = tmp_path_factory.mktemp("from-single-file") / "repository"
    assert export_checkpoint(str(single_file), target, config=str(v_prediction_config))
    return target


def test_the_weights_are_those_of_the_folder(checkpoint: Path, single_file: Path) -> None:
    expected = load_checkpoint(find_checkpoint(str(checkpoint))).pipeline
    actual = load_checkpoint(find_checkpoint(str(single_file)), str(checkpoint)).pipeline

    for name in ("text_encoder", "unet", "vae"):
        ours, theirs = (getattr(pipe, name).state_dict() for pipe in (actual, expected))
        assert ours.keys() == theirs.keys()
        assert all(bool((ours[key] == theirs[key]).all()) for key in theirs)


@pytest.mark.parametrize("network", ["text_encoder", "unet", "vae_decoder"])
def test_the_exported_networks_equal_those_of_the_folder(
    fp32: Path, from_single_file: Path, network: str
) -> None:
    ours, theirs = (
        onnx.load(path / network / "1" / "model.onnx").graph for path in (from_single_file, fp32)
    )

    assert [node.op_type for node in ours.node] == [node.op_type for node in theirs.node]
    weights = {entry.name: numpy_helper.to_array(entry) for entry in ours.initializer}
    assert len(weights) == len(theirs.initializer) > 0
    for entry in theirs.initializer:
        assert np.array_equal(weights[entry.name], numpy_helper.to_array(entry)), entry.name


def test_the_manifest_tells_file_and_scheduler(from_single_file: Path, single_file: Path) -> None:
    manifest = json.loads((from_single_file / "manifest.json").read_text())

    assert (manifest["name"], manifest["family"]) == ("repository", "sd1")
    assert manifest["checkpoint"]["source"] == str(single_file)
    assert manifest["noise_schedule"]["prediction_type"] == "v_prediction"
    assert manifest["verification"]["error"] <= manifest["verification"]["tolerance"]


def test_a_second_export_is_up_to_date(
    from_single_file: Path, single_file: Path, v_prediction_config: Path
) -> None:
    config = str(v_prediction_config)

    assert export_checkpoint(str(single_file), from_single_file, config=config) is False


def test_another_config_is_another_export(
    from_single_file: Path, single_file: Path, checkpoint: Path
) -> None:
    """The scheduler and the tokenizer come from the config."""
    with pytest.raises(ExportError, match="--force replaces it"):
        export_checkpoint(str(single_file), from_single_file, config=str(checkpoint))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("harm", [Path.unlink, truncate, empty])
def test_a_broken_file_is_named(
    single_file: Path, checkpoint: Path, tmp_path: Path, harm: Callable[[Path], None]
) -> None:
    path = tmp_path / "broken.safetensors"
    path.write_bytes(single_file.read_bytes())
    harm(path)

    with pytest.raises(ExportError, match=r"broken\.safetensors: "):
        export_checkpoint(str(path), tmp_path / "repository", config=str(checkpoint))
    assert not (tmp_path / "repository").exists()


@pytest.mark.parametrize(
    "part", ["model.diffusion_model.", "first_stage_model.decoder.", "cond_stage_model."]
)
def test_a_missing_weight_is_refused(
    single_file: Path, checkpoint: Path, tmp_path: Path, part: str
) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(single_file)
    names = sorted(name for name in tensors if name.startswith(part))
    del tensors[names[len(names) // 2]]
    path = tmp_path / "broken.safetensors"
    save_file(tensors, path)

    with pytest.raises(ExportError, match=r"broken\.safetensors: "):
        export_checkpoint(str(path), tmp_path / "repository", config=str(checkpoint))


def test_a_file_of_something_else_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    path = tmp_path / "lora.safetensors"
    save_file({"lora_up": torch.zeros(1)}, path)

    with pytest.raises(ExportError, match=r"lora\.safetensors: "):
        export_checkpoint(str(path), tmp_path / "repository", config=str(checkpoint))


def test_a_config_that_is_missing_is_named(single_file: Path, tmp_path: Path) -> None:
    config = str(tmp_path / "nowhere")

    with pytest.raises(ExportError, match="nowhere"):
        export_checkpoint(str(single_file), tmp_path / "repository", config=config)
