"""An exported repository: complete, verified, in agreement with its networks, and idempotent."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from darkroom_engine import Manifest
from darkroom_export import Backend, ExportError, Precision, export_checkpoint
from darkroom_export.checkpoint import find_checkpoint, load_checkpoint
from darkroom_export.manifest import Defaults, describe

NETWORKS = ("text_encoder", "unet", "vae_decoder", "vae_encoder")
FACES = ("darkroom", "stable_diffusion", "stable_diffusion_cancel", "stable_diffusion_stream")
TEMPLATES = Path(__file__).parents[2] / "model_repository"
ORT_TYPES = {
    model_config_pb2.TYPE_FP32: "tensor(float)",
    model_config_pb2.TYPE_INT64: "tensor(int64)",
}


@pytest.fixture(params=["fp32", "fp16"])
def repository(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def manifest_of(repository: Path) -> dict[str, Any]:
    return json.loads((repository / "manifest.json").read_text())


def session_of(repository: Path, network: str) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(
        str(repository / network / "1" / "model.onnx"), options, ["CPUExecutionProvider"]
    )


def template_files(model: str) -> dict[str, bytes]:
    """What a Python model consists of in the sources, by path."""
    return {
        str(path.relative_to(TEMPLATES)): path.read_bytes()
        for path in (TEMPLATES / model).rglob("*")
        if path.is_file() and path.parent.name != "__pycache__"
    }


def contents(repository: Path) -> dict[str, tuple[str, int]]:
    """Hash and time of every file."""
    return {
        str(path.relative_to(repository)): (
            hashlib.sha256(path.read_bytes()).hexdigest(),
            path.stat().st_mtime_ns,
        )
        for path in repository.rglob("*")
        if path.is_file()
    }


def test_the_repository_is_complete(repository: Path) -> None:
    files = {str(path.relative_to(repository)) for path in repository.rglob("*") if path.is_file()}

    shared = {Path(name).name for name in template_files("shared")}
    assert {"darkroom_stub.py", "darkroom_wire.py"} < shared
    expected = {"manifest.json", "tokenizer/tokenizer.json"}
    for face in FACES:
        expected |= set(template_files(face))
        expected |= {f"{face}/1/{name}" for name in shared}
    for network in NETWORKS:
        expected.add(f"{network}/config.pbtxt")
        expected |= {f"{network}/1/{name}" for name in ("model.py", "model.onnx", *shared)}
    assert files == expected
    assert "stable_diffusion/1/darkroom_engine/engine.py" in files
    assert not [file for file in files if "__pycache__" in file]


def test_nothing_is_left_beside_the_repository(repository: Path) -> None:
    assert [path.name for path in repository.parent.iterdir()] == [repository.name]


def test_the_manifest_describes_the_checkpoint(fp32: Path, checkpoint: Path) -> None:
    manifest = manifest_of(fp32)

    assert (manifest["format"], manifest["name"], manifest["family"]) == (4, "repository", "sd1")
    assert (manifest["precision"], manifest["backend"]) == ("fp32", "python")
    assert manifest["checkpoint"]["source"] == str(checkpoint)
    assert len(manifest["checkpoint"]["sha256"]) == 64
    assert manifest["latents"] == {
        "channels": 4,
        "vae_scale_factor": 8,
        "vae_scaling_factor": 0.18215,
        "vae_shift_factor": 0.0,
    }
    limits = manifest["limits"]
    assert (limits["default_width"], limits["default_height"]) == (128, 128)
    assert (limits["size_multiple"], limits["min_size"], limits["max_size"]) == (16, 32, 256)
    assert limits["max_clip_skip"] == 1  # of two layers
    assert {"darkroom", "torch", "diffusers", "onnx", "onnxruntime"} <= set(manifest["versions"])


def test_the_noise_schedule_is_the_checkpoints(fp32: Path) -> None:
    schedule = manifest_of(fp32)["noise_schedule"]
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    alphas_cumprod = np.cumprod(1 - betas)

    expected = np.sqrt((1 - alphas_cumprod) / alphas_cumprod)
    assert np.allclose(schedule["train_sigmas"], expected, rtol=1e-4)
    assert schedule["prediction_type"] == "epsilon"
    assert (schedule["timestep_spacing"], schedule["steps_offset"]) == ("leading", 1)


def test_every_network_was_compared_with_pytorch(repository: Path) -> None:
    manifest = manifest_of(repository)

    assert tuple(manifest["networks"]) == NETWORKS
    for record in manifest["networks"].values():
        verification = record["verification"]
        assert 0 <= verification["error"] <= verification["tolerance"] < 0.02
        batches = {shapes[0][0] for shapes in verification["input_shapes"]}
        assert len(batches) > 2
        assert list(verification["errors"]) == record["outputs"]
        assert max(verification["errors"].values()) == verification["error"]
    lengths = [sequence for _, _, (_, sequence, _) in verified_shapes(manifest, "unet")]
    assert {77, 154} < set(lengths)
    loop = manifest["verification"]
    assert 0 <= loop["error"] <= loop["tolerance"]
    assert 0 <= loop["picture_error"] <= loop["picture_tolerance"]


def verified_shapes(manifest: dict[str, Any], network: str) -> list[list[list[int]]]:
    """The shapes of the inputs of each call that was compared."""
    return manifest["networks"][network]["verification"]["input_shapes"]


def test_the_preview_is_in_the_manifest(repository: Path) -> None:
    preview = manifest_of(repository)["preview"]

    assert np.shape(preview["matrix"]) == (4, 3)
    assert np.shape(preview["bias"]) == (3,)
    assert np.isfinite(preview["r2"])


def test_half_precision_is_measurably_less_precise(fp32: Path, fp16: Path) -> None:
    errors = {
        path: [n["verification"]["error"] for n in manifest_of(path)["networks"].values()]
        for path in (fp32, fp16)
    }

    assert all(half > 5 * full for half, full in zip(errors[fp16], errors[fp32], strict=True))


def test_half_precision_weights_are_half_as_large(fp32: Path, fp16: Path) -> None:
    for network in NETWORKS:
        full, half = (
            sum(
                np.prod(entry.dims) * onnx.helper.tensor_dtype_to_np_dtype(entry.data_type).itemsize
                for entry in onnx.load(path / network / "1" / "model.onnx").graph.initializer
            )
            for path in (fp32, fp16)
        )
        assert half < 0.6 * full


@pytest.mark.parametrize("network", NETWORKS)
def test_the_config_agrees_with_the_graph(repository: Path, network: str) -> None:
    text = (repository / network / "config.pbtxt").read_text()
    config = text_format.Parse(text, model_config_pb2.ModelConfig())
    session = session_of(repository, network)

    record = manifest_of(repository)["networks"][network]
    assert (config.name, config.backend) == (network, "python")
    assert config.max_batch_size == record["max_batch_size"]
    assert [entry.name for entry in config.input] == record["inputs"]
    assert [entry.name for entry in config.output] == record["outputs"]
    pairs = [(config.input, session.get_inputs()), (config.output, session.get_outputs())]
    for ours, theirs in pairs:
        assert [entry.name for entry in ours] == [entry.name for entry in theirs]
        for entry, argument in zip(ours, theirs, strict=True):
            assert ORT_TYPES[entry.data_type] == argument.type
            batch, *dims = argument.shape
            assert isinstance(batch, str)
            if entry.HasField("reshape"):
                assert (list(entry.dims), dims) == ([1], [])
            else:
                assert list(entry.dims) == [-1 if isinstance(d, str) else d for d in dims]


def test_the_networks_are_the_contract(fp32: Path) -> None:
    networks = manifest_of(fp32)["networks"]

    assert {name: (record["inputs"], record["outputs"]) for name, record in networks.items()} == {
        "text_encoder": (["input_ids"], ["last_hidden_state", "hidden_states"]),
        "unet": (["sample", "timestep", "encoder_hidden_states"], ["out_sample"]),
        "vae_decoder": (["latent_sample"], ["sample"]),
        "vae_encoder": (["sample"], ["latent_parameters"]),
    }


@pytest.mark.parametrize("batch", [1, 2, 7, 63])
def test_the_batch_is_dynamic(repository: Path, batch: int) -> None:
    hidden, layers = session_of(repository, "text_encoder").run(
        None, {"input_ids": np.zeros((batch, 77), np.int64)}
    )
    out = run_unet(repository, batch, 4, 4)
    pixels = run_vae_decoder(repository, batch, 2, 2)

    assert hidden.shape == (batch, 77, 32)
    assert layers.shape == (batch, 3, 77, 32)
    assert out.shape == (batch, 4, 4, 4)
    assert pixels.shape == (batch, 3, 16, 16)


@pytest.mark.parametrize(("height", "width"), [(2, 2), (4, 10), (16, 16), (32, 18)])
def test_height_and_width_are_dynamic(repository: Path, height: int, width: int) -> None:
    assert run_unet(repository, 2, height, width).shape == (2, 4, height, width)
    pixels = run_vae_decoder(repository, 1, height, width)
    assert pixels.shape == (1, 3, 8 * height, 8 * width)
    (parameters,) = session_of(repository, "vae_encoder").run(None, {"sample": pixels})
    assert parameters.shape == (1, 8, height, width)


@pytest.mark.parametrize("chunks", [1, 2, 3, 4, 12])
def test_a_repeated_text_is_the_text(repository: Path, chunks: int) -> None:
    """So may texts of any lengths share a call, and the length is dynamic."""
    precision = manifest_of(repository)["precision"]
    expected = run_unet(repository, 2, 4, 4)
    repeated = run_unet(repository, 2, 4, 4, chunks)

    assert np.allclose(repeated, expected, atol=1e-5 if precision == "fp32" else 1e-2)


def test_the_last_of_all_hidden_states_is_the_last_hidden_state(repository: Path) -> None:
    ids = np.arange(2 * 77).reshape(2, 77)
    hidden, layers = session_of(repository, "text_encoder").run(None, {"input_ids": ids})

    assert np.allclose(layers[:, -1], hidden, atol=1e-6)
    assert not np.allclose(layers[:, 0], hidden, atol=1e-2)
    assert not np.allclose(layers[:, 1], hidden, atol=1e-2)


def run_unet(repository: Path, batch: int, height: int, width: int, chunks: int = 1) -> np.ndarray:
    generator = np.random.default_rng(0)
    hidden = np.random.default_rng(1).standard_normal((batch, 77, 32)).astype(np.float32)
    feed = {
        "sample": generator.standard_normal((batch, 4, height, width)).astype(np.float32),
        "timestep": np.linspace(1, 999, batch, dtype=np.float32),
        "encoder_hidden_states": np.concatenate([hidden] * chunks, axis=1),
    }
    return session_of(repository, "unet").run(None, feed)[0]


def run_vae_decoder(repository: Path, batch: int, height: int, width: int) -> np.ndarray:
    latents = np.ones((batch, 4, height, width), np.float32)
    return session_of(repository, "vae_decoder").run(None, {"latent_sample": latents})[0]


def test_each_row_has_a_timestep_of_its_own(fp32: Path) -> None:
    session = session_of(fp32, "unet")
    row = np.random.default_rng(0).standard_normal((1, 4, 8, 8)).astype(np.float32)
    hidden = np.ones((1, 77, 32), np.float32)

    def denoise(*timesteps: float) -> np.ndarray:
        rows = len(timesteps)
        feed = {
            "sample": row.repeat(rows, 0),
            "timestep": np.array(timesteps, np.float32),
            "encoder_hidden_states": hidden.repeat(rows, 0),
        }
        return session.run(None, feed)[0]

    together = denoise(10.0, 900.0)
    assert np.allclose(together[0], denoise(10.0)[0], atol=1e-5)
    assert np.allclose(together[1], denoise(900.0)[0], atol=1e-5)
    assert not np.allclose(together[0], together[1], atol=1e-3)


def test_the_engine_loads_the_manifest(repository: Path) -> None:
    manifest = Manifest.load(repository / "manifest.json")

    assert tuple(manifest.networks) == NETWORKS
    assert manifest.networks["unet"].max_batch_size == 63
    assert manifest.vae_scaling_factor == 0.18215


def test_a_second_export_is_up_to_date_and_keeps_the_networks(checkpoint: Path, fp32: Path) -> None:
    before = contents(fp32)
    is_new = export_checkpoint(str(checkpoint), fp32)
    after = contents(fp32)

    assert is_new is False
    kept = [name for name in before if name.endswith((".json", ".onnx"))]
    assert len(kept) == 2 + len(NETWORKS)
    assert {name: before[name] for name in kept} == {name: after[name] for name in kept}
    assert before.keys() == after.keys()


def test_a_second_export_brings_the_python_models_up_to_date(
    checkpoint: Path, fp32: Path, tmp_path: Path
) -> None:
    target = tmp_path / "repository"
    shutil.copytree(fp32, target)
    engine = target / "stable_diffusion" / "1" / "darkroom_engine"
    (engine / "removed_since.py").write_text("gone in the newer one")
    shutil.rmtree(target / "stable_diffusion_cancel")
    (target / "of_mine.txt").write_text("mine")
    python_models = [path for face in FACES for path in (target / face).rglob("*.*")]
    python_models += [target / network / "1" / "model.py" for network in NETWORKS]
    for path in python_models:
        path.write_text("an older one")

    assert export_checkpoint(str(checkpoint), target) is False
    (target / "of_mine.txt").unlink()
    files = {path.relative_to(fp32) for path in fp32.rglob("*") if path.is_file()}
    assert {path.relative_to(target) for path in target.rglob("*") if path.is_file()} == files
    for file in files:
        assert (target / file).read_bytes() == (fp32 / file).read_bytes(), file


@pytest.mark.parametrize("model", FACES)
def test_every_face_of_the_engine_is_its_template_and_what_is_shared(
    fp32: Path, model: str
) -> None:
    expected = template_files(model)
    shared = template_files("shared")

    assert {file: (fp32 / file).read_bytes() for file in expected} == expected
    assert "shared/darkroom_stub.py" in shared
    for file, content in shared.items():
        assert (fp32 / model / "1" / Path(file).name).read_bytes() == content


def test_a_repository_of_an_older_format_is_exported_again(
    checkpoint: Path, fp32: Path, tmp_path: Path, edit: Callable[..., None]
) -> None:
    target = tmp_path / "repository"
    shutil.copytree(fp32, target)
    # They had no backends to tell apart.
    identity = {key: it for key, it in manifest_of(fp32)["identity"].items() if key != "backend"}
    edit(target / "manifest.json", format=1, preview=None, identity=identity)
    (target / "unet" / "1" / "model.onnx").write_bytes(b"of an older engine")

    assert export_checkpoint(str(checkpoint), target) is True
    assert manifest_of(target) == manifest_of(fp32)
    Manifest.load(target / "manifest.json")


@pytest.mark.parametrize("version", [1, 99, "1", None])
def test_another_format_is_no_leave_to_replace(
    broken: Path, fp32: Path, tmp_path: Path, edit: Callable[..., None], version: object
) -> None:
    target = tmp_path / "repository"
    shutil.copytree(fp32, target)
    edit(target / "manifest.json", format=version)
    if version == 1:  # older, but of another checkpoint
        edit(broken / "scheduler" / "scheduler_config.json", prediction_type="v_prediction")
    before = contents(target)

    with pytest.raises(ExportError, match="--force replaces it"):
        export_checkpoint(str(broken), target)
    assert contents(target) == before


def test_a_copy_of_the_checkpoint_is_the_same_checkpoint(broken: Path, fp32: Path) -> None:
    assert export_checkpoint(str(broken), fp32) is False


@pytest.mark.parametrize("change", ["precision", "checkpoint", "network"])
def test_another_repository_is_not_replaced_without_force(
    broken: Path, fp32: Path, tmp_path: Path, edit: Callable[..., None], change: str
) -> None:
    target = tmp_path / "repository"
    shutil.copytree(fp32, target)
    if change == "checkpoint":
        edit(broken / "scheduler" / "scheduler_config.json", prediction_type="v_prediction")
    if change == "network":
        (target / "unet" / "1" / "model.onnx").unlink()
    before = contents(target)
    precision = Precision.FP16 if change == "precision" else Precision.FP32

    with pytest.raises(ExportError, match=r"holds repository in fp32.*--force replaces it"):
        export_checkpoint(str(broken), target, precision=precision)
    assert contents(target) == before


def test_a_network_that_was_changed_since_is_not_up_to_date(
    checkpoint: Path, fp32: Path, tmp_path: Path
) -> None:
    target = tmp_path / "repository"
    shutil.copytree(fp32, target)
    with (target / "unet" / "1" / "model.onnx").open("ab") as stream:
        stream.write(b"\0")

    with pytest.raises(ExportError, match="is damaged; --force replaces it"):
        export_checkpoint(str(checkpoint), target)


@pytest.mark.parametrize("content", [b"weights", b"others", None])
def test_an_adapter_that_was_changed_since_is_not_up_to_date(
    checkpoint: Path,
    fp32: Path,
    tmp_path: Path,
    edit: Callable[..., None],
    content: bytes | None,
) -> None:
    target = tmp_path / "repository"
    shutil.copytree(fp32, target)
    file = target / "unet" / "1" / "adapters" / "ink.safetensors"
    file.parent.mkdir()
    digest = hashlib.sha256(b"weights").hexdigest()
    record = {"rank": 4, "networks": ["unet"], "files": {str(file.relative_to(target)): digest}}
    edit(target / "manifest.json", loras={"ink": record})
    if content is not None:
        file.write_bytes(content)

    if content == b"weights":
        assert export_checkpoint(str(checkpoint), target) is False
        return
    with pytest.raises(ExportError, match="is damaged; --force replaces it"):
        export_checkpoint(str(checkpoint), target)


def test_force_replaces_all_of_the_repository(fp16: Path) -> None:
    assert manifest_of(fp16)["precision"] == "fp16"
    assert not (fp16 / "left-behind.txt").exists()


BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.mark.parametrize(
    ("config", "schedule", "solver"),
    [
        (
            {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"},
            {"prediction_type": "v_prediction"},
            {},
        ),
        (
            {"_class_name": "PNDMScheduler", "steps_offset": 1, "skip_prk_steps": True},
            {"prediction_type": "epsilon", "steps_offset": 1},
            {"solver_type": "bh2", "solver_order": 2},
        ),
        (
            {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"},
            {"timestep_spacing": "trailing"},
            {},
        ),
        (
            {"_class_name": "DPMSolverMultistepScheduler", "use_karras_sigmas": True},
            {},
            {"use_karras_sigmas": True},
        ),
        (
            {"_class_name": "UniPCMultistepScheduler", "solver_order": 3, "solver_type": "bh1"},
            {"timestep_spacing": "linspace"},
            {"solver_order": 3, "solver_type": "bh1"},
        ),
    ],
    ids=lambda value: value.get("_class_name") if isinstance(value, dict) else None,
)
def test_the_checkpoints_own_scheduler_lands_in_the_manifest(
    broken: Path, config: dict[str, Any], schedule: dict[str, Any], solver: dict[str, Any]
) -> None:
    text = json.dumps({**BETAS, "num_train_timesteps": 1000, **config})
    (broken / "scheduler" / "scheduler_config.json").write_text(text)
    index = json.loads((broken / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", config["_class_name"]]
    (broken / "model_index.json").write_text(json.dumps(index))
    checkpoint = load_checkpoint(find_checkpoint(str(broken)))
    manifest = describe(checkpoint, Backend.PYTHON, Precision.FP32, Defaults(), [])

    assert manifest["noise_schedule"] | schedule == manifest["noise_schedule"]
    assert manifest["solver"] | solver == manifest["solver"]
    assert len(manifest["noise_schedule"]["train_sigmas"]) == 1000
