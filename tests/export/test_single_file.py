"""A single file in the original layout exports to the networks that the diffusers folder gives."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from safetensors.torch import load_file, save_file

from darkroom_export import ExportError, export_checkpoint
from darkroom_export.checkpoint import find_checkpoint, load_checkpoint
from darkroom_export.single_file import pipeline_class_of
from darkroom_export.weights import StoredTensor, read_header

LAYOUTS = {
    "tiny-sd15": "StableDiffusionPipeline",
    "tiny-sd15-inpaint": "StableDiffusionInpaintPipeline",
    "tiny-sd21": "StableDiffusionPipeline",
    "tiny-sdxl": "StableDiffusionXLPipeline",
    "tiny-sdxl-inpaint": "StableDiffusionXLInpaintPipeline",
    "tiny-sdxl-refiner": "StableDiffusionXLImg2ImgPipeline",
}
Make = Callable[[str], Path]


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


@pytest.mark.parametrize("architecture", LAYOUTS)
def test_the_weights_are_those_of_the_folder(
    make_checkpoint: Make, make_single_file: Make, architecture: str
) -> None:
    folder, file = make_checkpoint(architecture), make_single_file(architecture)
    expected = load_checkpoint(find_checkpoint(str(folder)))
    actual = load_checkpoint(find_checkpoint(str(file)), str(folder))

    assert actual.family == expected.family
    assert type(actual.pipeline) is type(expected.pipeline)
    assert actual.own_scheduler.config == expected.own_scheduler.config
    assert actual.pipeline.scheduler.config == expected.pipeline.scheduler.config
    for name, module in expected.pipeline.components.items():
        if not isinstance(module, torch.nn.Module):
            continue
        ours = getattr(actual.pipeline, name)
        assert not ours.training
        ours, theirs = ours.state_dict(), module.state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
        assert [tensor.dtype for tensor in ours.values()] == [t.dtype for t in theirs.values()]


@pytest.mark.parametrize("architecture", LAYOUTS)
def test_the_kind_is_told_from_the_names_of_the_tensors(
    make_single_file: Make, architecture: str
) -> None:
    """So that without a config, diffusers is asked for the right one."""
    path = make_single_file(architecture)

    assert pipeline_class_of(path, read_header(path)) == LAYOUTS[architecture]


def test_stable_diffusion_3_is_told_from_the_names_of_the_tensors() -> None:
    name = "model.diffusion_model.joint_blocks.0.context_block.attn.qkv.weight"
    tensors = {name: StoredTensor("F16", (96, 32))}

    assert pipeline_class_of(Path("sd3"), tensors) == "StableDiffusion3Pipeline"


def test_a_consistency_model_must_be_a_folder(
    make_checkpoint: Make, make_single_file: Make
) -> None:
    """diffusers does not read the one tensor that makes it one."""
    config, path = str(make_checkpoint("tiny-lcm")), make_single_file("tiny-lcm")

    with pytest.raises(ExportError, match="only supported as a diffusers folder"):
        load_checkpoint(find_checkpoint(str(path), config), config)


@pytest.mark.parametrize(
    ("architecture", "other"),
    [("tiny-sd15", "tiny-sdxl"), ("tiny-sdxl", "tiny-sd21"), ("tiny-sd21", "tiny-sd3")],
)
def test_a_config_of_another_kind_is_refused(
    make_checkpoint: Make, make_single_file: Make, architecture: str, other: str
) -> None:
    config, path = str(make_checkpoint(other)), make_single_file(architecture)

    with pytest.raises(
        ExportError, match=rf"{architecture}\.safetensors: is one of .*, but .*{other}"
    ):
        load_checkpoint(find_checkpoint(str(path), config), config)


def test_tables_in_full_precision_do_not_count(
    checkpoint: Path, single_file: Path, tmp_path: Path
) -> None:
    """Files of half precision come with the noise schedule in float32."""
    tensors = load_file(single_file) | {"alphas_cumprod": torch.ones(1000)}
    path = tmp_path / "with-schedule.safetensors"
    save_file(tensors, path)

    loaded = load_checkpoint(find_checkpoint(str(path)), str(checkpoint))
    assert loaded.pipeline.unet.dtype == torch.float16


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
    tensors = load_file(single_file)
    names = sorted(name for name in tensors if name.startswith(part))
    del tensors[names[len(names) // 2]]
    path = tmp_path / "broken.safetensors"
    save_file(tensors, path)

    with pytest.raises(ExportError, match=r"broken\.safetensors: .*weights are missing"):
        export_checkpoint(str(path), tmp_path / "repository", config=str(checkpoint))


def test_a_file_of_something_else_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    save_file({"lora_up": torch.zeros(1)}, path)

    with pytest.raises(
        ExportError, match=r"lora\.safetensors: holds no Stable Diffusion 1, 2, 3 or XL"
    ):
        export_checkpoint(str(path), tmp_path / "repository", config=str(checkpoint))


def test_a_config_that_is_missing_is_named(single_file: Path, tmp_path: Path) -> None:
    config = str(tmp_path / "nowhere")

    with pytest.raises(ExportError, match="nowhere"):
        export_checkpoint(str(single_file), tmp_path / "repository", config=config)
