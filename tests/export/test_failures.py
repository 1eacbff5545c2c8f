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

import pytest
import torch
from safetensors.torch import load_file, save_file

from darkroom_export import ExportError, export_checkpoint
from darkroom_export.repository import atomic_directory

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
    edit(broken / "model_index.json", _class_name="FluxPipeline")

    assert_refused(
        broken,
        target,
        "FluxPipeline is not supported, there are StableDiffusionPipeline, .*, "
        "StableDiffusion3Pipeline$",
    )


@pytest.mark.parametrize("weights", [UNET, VAE, TEXT_ENCODER])
@pytest.mark.parametrize("harm", ["missing", "empty", "truncated", "garbled", "flipped"])
def test_broken_weights_are_named(broken: Path, target: Path, weights: str, harm: str) -> None:
    path = broken / weights
    content = path.read_bytes()
    if harm == "missing":
        path.unlink()
    else:
        broken_contents = {
            "empty": b"",
            "truncated": content[:-1000],
            "garbled": content[:20] + b"\xff" * 40 + content[60:],
            # The header's length.
            "flipped": content[:2] + bytes([content[2] ^ 4]) + content[3:],
        }
        path.write_bytes(broken_contents[harm])

    assert_refused(broken, target, f"{weights}: ")


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

    assert_refused(broken, target, "unet: .*expected shape")


@pytest.mark.parametrize(
    ("weights", "name"), [(UNET, "conv_in.weight"), (TEXT_ENCODER, "token_embedding.weight")]
)
def test_a_tensor_whose_shape_is_changed_in_the_header_is_named(
    broken: Path, target: Path, weights: str, name: str
) -> None:
    tensors = load_file(broken / weights)
    (key,) = (key for key in tensors if key.endswith(name))
    tensors[key] = tensors[key].transpose(0, 1).contiguous()
    save_file(tensors, broken / weights, {"format": "pt"})

    assert_refused(broken, target, f"{weights.partition('/')[0]}: .*{name}")


@pytest.mark.parametrize("part", ["text_encoder", "unet", "vae"])
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "no such file"),
        (b"", "malformed"),
        (b"{", "malformed"),
        (b"[]", "malformed, not a JSON object"),
        (b"\xff\xfe\0", "malformed"),
    ],
)
def test_a_broken_config_is_named(
    broken: Path, target: Path, part: str, content: bytes | None, reason: str
) -> None:
    config = broken / part / "config.json"
    if content is None:
        config.unlink()
    else:
        config.write_bytes(content)

    assert_refused(broken, target, f"{part}/config.json: {reason}")


@pytest.mark.parametrize(
    ("part", "values"),
    [
        ("unet", {"down_block_types": ["Magic", "DownBlock2D"]}),
        ("unet", {"block_out_channels": "wide"}),
        ("vae", {"block_out_channels": [8]}),
        ("text_encoder", {"hidden_size": "wide"}),
        ("text_encoder", {"num_attention_heads": 5}),
    ],
)
def test_a_config_that_makes_no_sense_is_refused_in_one_line(
    broken: Path, target: Path, edit: Callable[..., None], part: str, values: dict[str, Any]
) -> None:
    edit(broken / part / "config.json", **values)

    assert_refused(broken, target, rf"\A[^\n]*{part}: [^\n]+\Z")


class Bomb:
    """What a pickle may hold: reading it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_pickles_are_refused_unread(broken: Path, target: Path, tmp_path: Path) -> None:
    torch.save(Bomb(tmp_path / "exploded"), (broken / UNET).with_suffix(".bin"))
    (broken / UNET).unlink()

    assert_refused(broken, target, r"unet/diffusion_pytorch_model\.bin: is a pickle, .* convert it")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("part", ["tokenizer", "scheduler", "unet", "vae", "text_encoder"])
def test_a_missing_part_is_named(broken: Path, target: Path, part: str) -> None:
    shutil.rmtree(broken / part)

    assert_refused(broken, target, f"broken/{part}")


def test_a_broken_tokenizer_is_named(broken: Path, target: Path) -> None:
    for file in ("vocab.json", "tokenizer.json"):
        (broken / "tokenizer" / file).write_text("{")

    assert_refused(broken, target, "broken/tokenizer: ")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"thresholding": True}, "thresholding is not supported"),
        ({"use_flow_sigmas": True}, "use_flow_sigmas is not supported"),
        ({"use_exponential_sigmas": True}, "use_exponential_sigmas is not supported"),
        ({"use_beta_sigmas": True}, "use_beta_sigmas is not supported"),
        ({"sigma_max": 80.0}, "sigma_max is not supported"),
        ({"prediction_type": "magic"}, "prediction_type 'magic' is not supported, there are eps"),
        ({"beta_schedule": "magic"}, "scheduler.*magic"),
        ({"_class_name": "Magic"}, r"scheduler_config\.json: _class_name 'Magic' is no scheduler"),
        ({"_class_name": None}, r"scheduler_config\.json: _class_name None is no scheduler"),
        ({"_class_name": "UNet2DModel"}, "_class_name 'UNet2DModel' is no scheduler"),
        ({"_class_name": "EDMEulerScheduler"}, "EDMEulerScheduler is not supported here"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "FlowMatch.* is not supported here"),
        (
            {"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"},
            "timestep_type 'continuous' is not supported, there is discrete",
        ),
        (
            {"_class_name": "EulerDiscreteScheduler", "interpolation_type": "log_linear"},
            "interpolation_type 'log_linear' is not supported, there is linear",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_scheduler_that_the_engine_cannot_do_is_refused(
    broken: Path, target: Path, edit: Callable[..., None], values: dict[str, Any], message: str
) -> None:
    edit(broken / "scheduler" / "scheduler_config.json", **values)

    assert_refused(broken, target, message)


def test_a_malformed_scheduler_is_named(broken: Path, target: Path) -> None:
    (broken / "scheduler" / "scheduler_config.json").write_text("{")

    assert_refused(broken, target, r"scheduler_config\.json: malformed")


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


@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_a_vae_that_makes_nan_is_named(broken: Path, target: Path, side: str) -> None:
    tensors = load_file(broken / VAE)
    name = f"{side}.conv_out.bias"
    tensors[name] = tensors[name] * float("nan")
    save_file(tensors, broken / VAE, {"format": "pt"})

    assert_refused(broken, target, f"vae: the {side}'s output is not finite")
