"""What engines are compared with is of the kind that they get in service."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_tokenizers import write_byte_tokenizer

from darkroom_export.tensorrt_inputs import Inputs, last_timestep

BEGIN, END, PAD, SIZE = 3, 5, 7, 256


def manifest(*, has_begin: bool = True, has_pad: bool = True) -> dict[str, Any]:
    tokenizer = {
        "file": "tokenizer.json",
        "bos_token_id": BEGIN if has_begin else None,
        "eos_token_id": END,
        "pad_token_id": PAD if has_pad else None,
    }
    return {
        "noise_schedule": {"train_sigmas": [0.1] * 500},
        "limits": {"max_size": 2048},
        "text": {"encoders": [{"network": "text_encoder", "tokenizer": tokenizer}]},
        "variants": {"ink": {"text_encoder": "text_encoder_ink", "unet": "unet_ink"}, "dot": {}},
    }


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    write_byte_tokenizer(tmp_path / "tokenizer.json")
    return tmp_path


def draw(network: str, repository: Path, name: str, *shape: int, **kind: bool) -> np.ndarray:
    made: np.ndarray = Inputs(network, manifest(**kind), repository).draw({name: shape}, 1)[name]
    assert made.shape == shape
    return made


@pytest.mark.parametrize("network", ["text_encoder", "text_encoder_ink"])
def test_token_ids_are_texts(repository: Path, network: str) -> None:
    ids = draw(network, repository, "input_ids", 50, 77)

    assert ids.dtype == np.int64
    assert ids.min() >= 0
    assert ids.max() < SIZE
    assert (ids[:, 0] == BEGIN).all()
    assert ((ids == END).sum(axis=1) == 1).all()
    ends = (ids == END).argmax(axis=1)
    assert len(set(ends)) > 10
    assert all((row[end + 1 :] == PAD).all() for row, end in zip(ids, ends, strict=True))


def test_a_tokenizer_may_have_neither_beginning_nor_padding(repository: Path) -> None:
    ids = draw("text_encoder", repository, "input_ids", 20, 10, has_begin=False, has_pad=False)

    assert set(ids[:, 0]) != {BEGIN}
    # The end fills up.
    assert (ids[:, -1] == END).all()


@pytest.mark.parametrize(
    ("network", "name", "low", "high"),
    [
        ("unet", "timestep", 0, 499),
        ("unet", "time_ids", 0, 2048),
        ("controlnet_canny", "controlnet_cond", 0, 1),
        ("controlnet_canny", "conditioning_scale", 0, 2),
        ("vae_encoder", "sample", -1, 1),
    ],
)
def test_numbers_are_in_their_ranges(
    repository: Path, network: str, name: str, low: float, high: float
) -> None:
    values = draw(network, repository, name, 1000)

    assert values.dtype == np.float32
    assert low <= values.min() < low + 0.1 * (high - low)
    assert high - 0.1 * (high - low) < values.max() <= high


@pytest.mark.parametrize(
    ("network", "name"), [("unet", "sample"), ("vae_decoder", "latent_sample")]
)
def test_all_else_is_normal_noise(repository: Path, network: str, name: str) -> None:
    values = draw(network, repository, name, 1000)

    assert values.dtype == np.float32
    assert values.std() == pytest.approx(1.0, abs=0.1)


def test_a_seed_means_the_same_inputs(repository: Path) -> None:
    inputs = Inputs("unet", manifest(), repository)
    first, again, other = (inputs.draw({"sample": (4,)}, seed)["sample"] for seed in (1, 1, 2))

    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_the_last_timestep_is_in_the_schedule() -> None:
    assert last_timestep({"train_sigmas": [1.0] * 1000}) == 999.0
    assert last_timestep({"num_train_timesteps": 1000, "shift": 3.0}) == 1000.0
