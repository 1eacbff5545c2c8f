"""What cannot be exported is refused with file and reason, and leaves nothing behind."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from safetensors.torch import load_file, save_file

from darkroom_export import ExportError, Precision, export_checkpoint
from darkroom_export.checkpoint import find_checkpoint, load_checkpoint
from darkroom_export.networks import NetworkSpec, network_specs
from darkroom_export.repository import atomic_directory
from darkroom_export.verify import (
    LoopReference,
    Reference,
    loop_reference,
    network_reference,
    relative_error,
    verify_loop,
    verify_network,
)

UNET = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
TEXT_ENCODER = "text_encoder/model.safetensors"
WAIT_S = 120.0


def assert_refused(source: Path, target: Path, match: str, *, force: bool = False) -> None:
    """Exporting `source` is refused, and `target` and what is beside it are as before."""
    before = sorted(target.parent.rglob("*")) if target.parent.is_dir() else None
    with pytest.raises(ExportError, match=match):
        export_checkpoint(str(source), target, force=force)
    assert (sorted(target.parent.rglob("*")) if target.parent.is_dir() else None) == before


@pytest.fixture
def target(tmp_path: Path) -> Path:
    (tmp_path / "targets").mkdir()
    return tmp_path / "targets" / "repository"


def test_a_missing_folder_is_named(tmp_path: Path, target: Path) -> None:
    assert_refused(tmp_path / "nowhere", target, "nowhere: no such folder, and not a hub id")


def test_a_folder_without_an_index_is_no_diffusers_folder(broken: Path, target: Path) -> None:
    (broken / "model_index.json").unlink()

    assert_refused(broken, target, r"model_index\.json: missing, so .* is no diffusers folder")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"null", b"\xff\xfe\0"])
def test_a_malformed_index_is_named(broken: Path, target: Path, content: bytes) -> None:
    (broken / "model_index.json").write_bytes(content)

    assert_refused(broken, target, r"model_index\.json: malformed")


def test_an_unsupported_pipeline_is_refused_with_those_that_exist(
    broken: Path, target: Path, edit: Callable[..., None]
) -> None:
    edit(broken / "model_index.json", _class_name="StableDiffusionXLPipeline")

    assert_refused(
        broken, target, "StableDiffusionXLPipeline is not supported, there are StableDiffusionP"
    )


@pytest.mark.parametrize("weights", [UNET, VAE, TEXT_ENCODER])
@pytest.mark.parametrize("harm", ["missing", "empty", "truncated", "garbled"])
def test_broken_weights_are_named(broken: Path, target: Path, weights: str, harm: str) -> None:
    path = broken / weights
    content = path.read_bytes()
    if harm == "missing":
        path.unlink()
    else:
        garbled = content[:20] + b"\xff" * 40 + content[60:]
        path.write_bytes({"empty": b"", "truncated": content[:-1000], "garbled": garbled}[harm])

    assert_refused(broken, target, weights.partition("/")[0])


@pytest.mark.parametrize("weights", [UNET, VAE, TEXT_ENCODER])
def test_a_missing_weight_is_named(broken: Path, target: Path, weights: str) -> None:
    """diffusers and transformers would fill it with random numbers and say nothing."""
    tensors = load_file(broken / weights)
    name = sorted(tensors)[len(tensors) // 2]
    del tensors[name]
    save_file(tensors, broken / weights, {"format": "pt"})

    assert_refused(broken, target, name.removeprefix("text_model."))


def test_weights_of_another_shape_are_refused(
    broken: Path, target: Path, edit: Callable[..., None]
) -> None:
    edit(broken / "unet" / "config.json", block_out_channels=[32, 128])

    assert_refused(broken, target, "expected shape")


class Bomb:
    """What a pickle may hold: reading it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_pickles_are_refused_unread(broken: Path, target: Path, tmp_path: Path) -> None:
    torch.save(Bomb(tmp_path / "exploded"), (broken / UNET).with_suffix(".bin"))
    (broken / UNET).unlink()

    assert_refused(broken, target, r"no file named diffusion_pytorch_model\.safetensors")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("part", ["tokenizer", "scheduler", "unet"])
def test_a_missing_part_is_named(broken: Path, target: Path, part: str) -> None:
    shutil.rmtree(broken / part)

    assert_refused(broken, target, part)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"thresholding": True}, "thresholding is not supported"),
        ({"use_flow_sigmas": True}, "use_flow_sigmas is not supported"),
        ({"use_exponential_sigmas": True}, "use_exponential_sigmas is not supported"),
        ({"use_beta_sigmas": True}, "beta.sigmas is not supported|beta sigmas"),
        ({"prediction_type": "magic"}, "prediction_type"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_scheduler_that_the_engine_cannot_do_is_refused(
    broken: Path, target: Path, edit: Callable[..., None], values: dict[str, Any], message: str
) -> None:
    edit(broken / "scheduler" / "scheduler_config.json", **values)

    assert_refused(broken, target, message)


def test_a_target_that_is_a_file_is_refused(checkpoint: Path, target: Path) -> None:
    target.write_text("mine")

    for force in (False, True):
        assert_refused(checkpoint, target, "repository: is a file, not a folder", force=force)
    assert target.read_text() == "mine"


def test_a_target_under_a_file_is_refused(checkpoint: Path, target: Path) -> None:
    target.write_text("mine")

    assert_refused(checkpoint, target / "repository", "repository")


def test_a_folder_that_is_not_ours_is_left_alone_even_by_force(
    checkpoint: Path, target: Path
) -> None:
    target.mkdir()
    (target / "thesis.txt").write_text("mine")

    for force in (False, True):
        assert_refused(checkpoint, target, "is not empty, and no model repository", force=force)
    assert (target / "thesis.txt").read_text() == "mine"


def test_a_repository_whose_manifest_is_malformed_is_left_alone(
    checkpoint: Path, target: Path
) -> None:
    target.mkdir()
    for text in ("{", "[]"):
        (target / "manifest.json").write_text(text)
        assert_refused(checkpoint, target, r"manifest\.json: ")
        assert (target / "manifest.json").read_text() == text


@pytest.mark.parametrize("stage", ["running the checkpoint in PyTorch", "exporting text_encoder"])
def test_an_interrupted_export_leaves_nothing(checkpoint: Path, target: Path, stage: str) -> None:
    @contextlib.contextmanager
    def interrupting(task: str) -> Iterator[None]:
        if task.startswith(stage):
            assert len(list(target.parent.iterdir())) == 1, "something was being written"
            raise KeyboardInterrupt
        yield

    with pytest.raises(KeyboardInterrupt):
        export_checkpoint(str(checkpoint), target, progress=interrupting)
    assert list(target.parent.iterdir()) == []


def test_an_export_that_fails_leaves_the_old_repository(
    broken: Path, fp32: Path, target: Path
) -> None:
    tensors = load_file(broken / TEXT_ENCODER)
    (name,) = (name for name in tensors if name.endswith("final_layer_norm.bias"))
    tensors[name] = tensors[name] * float("nan")
    save_file(tensors, broken / TEXT_ENCODER, {"format": "pt"})
    shutil.copytree(fp32, target)
    before = (target / "manifest.json").read_bytes()

    assert_refused(broken, target, "not finite", force=True)
    assert (target / "manifest.json").read_bytes() == before


EXPORT = """
import sys
from pathlib import Path
from darkroom_export import export_checkpoint
export_checkpoint(sys.argv[1], Path(sys.argv[2]))
"""


def test_a_killed_export_leaves_no_target_and_the_next_removes_the_rest(
    checkpoint: Path, target: Path
) -> None:
    process = subprocess.Popen([sys.executable, "-c", EXPORT, str(checkpoint), str(target)])
    give_up_at = time.monotonic() + WAIT_S
    while not list(target.parent.iterdir()):
        assert process.poll() is None
        assert time.monotonic() < give_up_at
        time.sleep(0.01)
    time.sleep(random.uniform(0, 2))
    process.kill()

    assert process.wait() == -signal.SIGKILL
    (leftover,) = target.parent.iterdir()
    assert leftover.name.startswith(".")
    with atomic_directory(target) as partial:
        assert list(target.parent.iterdir()) == [partial]
        (partial / "manifest.json").write_text("{}")
    assert list(target.parent.iterdir()) == [target]


def test_the_folder_of_an_export_that_still_runs_is_left_alone(target: Path) -> None:
    running = target.with_name(f".{target.name}.partial-{os.getppid()}")
    running.mkdir()
    with atomic_directory(target):
        assert running.exists()

    assert sorted(path.name for path in target.parent.iterdir()) == [running.name, target.name]


def test_folders_with_a_similar_name_are_left_alone(target: Path) -> None:
    other = target.with_name(f".{target.name}.partial-of-mine")
    other.mkdir()
    with atomic_directory(target):
        pass

    assert other.exists()


def test_what_a_kill_between_the_two_renames_moved_away_is_put_back(target: Path) -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    moved = target.with_name(f".{target.name}.replaced-{process.pid}")
    moved.mkdir(parents=True)
    (moved / "manifest.json").write_text("the old one")

    with pytest.raises(KeyboardInterrupt), atomic_directory(target):
        raise KeyboardInterrupt

    assert (target / "manifest.json").read_text() == "the old one"
    assert not moved.exists()


@pytest.mark.parametrize("name", ["[sd]", "a*b"])
def test_leftovers_are_found_whatever_the_targets_name(target: Path, name: str) -> None:
    target = target.with_name(name)
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    leftover = target.with_name(f".{name}.partial-{process.pid}")
    leftover.mkdir()
    with atomic_directory(target):
        pass

    assert not leftover.exists()


def test_the_working_folder_itself_may_be_the_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "repository").mkdir()
    monkeypatch.chdir(tmp_path / "repository")
    with atomic_directory(Path()) as partial:
        (partial / "manifest.json").write_text("{}")

    assert [path.name for path in tmp_path.rglob("*")] == ["repository", "manifest.json"]


@pytest.fixture(scope="module")
def pipeline(checkpoint: Path) -> Any:
    return load_checkpoint(find_checkpoint(str(checkpoint))).pipeline


@pytest.fixture(scope="module")
def specs(pipeline: Any) -> dict[str, NetworkSpec]:
    return {spec.name: spec for spec in network_specs(pipeline)}


@pytest.fixture(scope="module")
def references(pipeline: Any, specs: dict[str, NetworkSpec]) -> dict[str, Reference]:
    return {name: network_reference(spec, pipeline, 3) for name, spec in specs.items()}


LoopInputs = tuple[LoopReference, Any, float, dict[str, Path]]


@pytest.fixture(scope="module")
def loop_inputs(fp32: Path, pipeline: Any) -> LoopInputs:
    paths = {name: graph_of(fp32, name) for name in NETWORKS}
    scaling = pipeline.vae.config.scaling_factor
    return loop_reference(pipeline, 3), pipeline.scheduler, scaling, paths


TEXT = "text_encoder"
NETWORKS = (TEXT, "unet", "vae_decoder")


def graph_of(repository: Path, network: str) -> Path:
    return repository / network / "1" / "model.onnx"


def spoil(path: Path, target: Path, spoiled: Callable[[np.ndarray], np.ndarray]) -> Path:
    """A copy of a graph, with its largest weight changed."""
    model = onnx.load(path)
    largest = max(model.graph.initializer, key=lambda entry: np.prod(entry.dims))
    array = numpy_helper.to_array(largest)
    largest.CopyFrom(numpy_helper.from_array(spoiled(array).astype(array.dtype), largest.name))
    onnx.save(model, target)
    return target


@pytest.mark.parametrize("network", NETWORKS)
def test_the_right_network_passes(
    fp32: Path, specs: dict[str, NetworkSpec], references: dict[str, Reference], network: str
) -> None:
    path = graph_of(fp32, network)
    record = verify_network(specs[network], references[network], path, Precision.FP32)

    assert 0 <= record["error"] <= record["tolerance"]


@pytest.mark.parametrize("network", NETWORKS)
def test_a_network_with_slightly_wrong_weights_is_found(
    fp32: Path,
    tmp_path: Path,
    specs: dict[str, NetworkSpec],
    references: dict[str, Reference],
    network: str,
) -> None:
    path = spoil(graph_of(fp32, network), tmp_path / "wrong.onnx", lambda weights: 1.05 * weights)

    with pytest.raises(ExportError, match=f"{network}: .* of fp32 ONNX differs from PyTorch's by"):
        verify_network(specs[network], references[network], path, Precision.FP32)


@pytest.mark.parametrize("network", NETWORKS)
def test_a_network_that_makes_nan_is_found(
    fp32: Path,
    tmp_path: Path,
    specs: dict[str, NetworkSpec],
    references: dict[str, Reference],
    network: str,
) -> None:
    path = spoil(graph_of(fp32, network), tmp_path / "nan.onnx", lambda w: np.full_like(w, np.nan))

    with pytest.raises(ExportError, match=f"{network}: .* is not finite, the precision"):
        verify_network(specs[network], references[network], path, Precision.FP32)


def test_a_network_of_another_shape_is_found(
    fp32: Path, specs: dict[str, NetworkSpec], references: dict[str, Reference]
) -> None:
    reference = references["vae_decoder"]
    cases = [(inputs, (pixels[:, :, ::2],)) for inputs, (pixels,) in reference.cases]
    path = graph_of(fp32, "vae_decoder")

    with pytest.raises(ExportError, match=r"vae_decoder: sample is .*, PyTorch's is \("):
        verify_network(specs["vae_decoder"], Reference(cases), path, Precision.FP32)


def test_a_reference_that_is_not_finite_verifies_nothing(
    fp32: Path, specs: dict[str, NetworkSpec], references: dict[str, Reference]
) -> None:
    nan = np.float32("nan")
    cases = [(inputs, (nan * output,)) for inputs, (output,) in references["unet"].cases]
    path = graph_of(fp32, "unet")

    with pytest.raises(ExportError, match="unet: out_sample of PyTorch is not finite"):
        verify_network(specs["unet"], Reference(cases), path, Precision.FP32)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda layers: layers * np.float32(1.01), "hidden_states of fp32 ONNX differs"),
        (lambda layers: layers[:, 1:], "hidden_states is .*, PyTorch's is"),
        (lambda layers: layers * np.float32("nan"), "hidden_states of PyTorch is not finite"),
    ],
)
def test_every_output_is_compared(
    fp32: Path,
    specs: dict[str, NetworkSpec],
    references: dict[str, Reference],
    wrong: Callable[[np.ndarray], np.ndarray],
    message: str,
) -> None:
    cases = [(inputs, (last, wrong(all_))) for inputs, (last, all_) in references[TEXT].cases]

    with pytest.raises(ExportError, match=f"text_encoder: {message}"):
        verify_network(specs[TEXT], Reference(cases), graph_of(fp32, TEXT), Precision.FP32)


@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_a_vae_that_makes_nan_is_named(broken: Path, target: Path, side: str) -> None:
    tensors = load_file(broken / VAE)
    name = f"{side}.conv_out.bias"
    tensors[name] = tensors[name] * float("nan")
    save_file(tensors, broken / VAE, {"format": "pt"})

    assert_refused(broken, target, f"vae: the {side}'s output is not finite")


def test_an_error_of_nan_is_no_error_of_zero() -> None:
    ones = np.ones(3, np.float32)

    for actual, expected in ((ones * np.nan, ones), (ones, ones * np.nan), (ones * np.inf, ones)):
        with pytest.raises(ExportError, match=r"it .*not finite"):
            relative_error("it", actual, expected)


def test_the_right_loop_passes(loop_inputs: LoopInputs) -> None:
    record = verify_loop(*loop_inputs, Precision.FP32)

    assert record["error"] <= record["tolerance"]
    assert record["picture_error"] <= record["picture_tolerance"]


@pytest.mark.parametrize(
    ("network", "factor"),
    # The picture hardly changes with one weight of the decoder, which normalises what it makes.
    [
        ("text_encoder", 1.5),
        ("unet", 1.5),
        ("text_encoder", np.nan),
        ("unet", np.nan),
        ("vae_decoder", np.nan),
    ],
)
def test_a_wrong_network_in_the_loop_is_found(
    loop_inputs: LoopInputs, tmp_path: Path, network: str, factor: float
) -> None:
    loop, scheduler, scaling, paths = loop_inputs
    wrong = spoil(paths[network], tmp_path / "wrong.onnx", lambda weights: factor * weights)

    with pytest.raises(ExportError, match="the loop"):
        verify_loop(loop, scheduler, scaling, paths | {network: wrong}, Precision.FP32)


def test_the_wrong_schedule_in_the_loop_is_found(loop_inputs: LoopInputs) -> None:
    loop, scheduler, scaling, paths = loop_inputs
    wrong = type(scheduler).from_config(scheduler.config, prediction_type="v_prediction")

    with pytest.raises(ExportError, match="the loop"):
        verify_loop(loop, wrong, scaling, paths, Precision.FP32)


def test_the_wrong_scaling_in_the_loop_is_found(loop_inputs: LoopInputs) -> None:
    loop, scheduler, _, paths = loop_inputs

    with pytest.raises(ExportError, match=r"the loop .* picture by"):
        verify_loop(loop, scheduler, 0.5, paths, Precision.FP32)
