"""Random inputs to compare engines with, of the kind that networks are called with in service."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from darkroom_export.profiles import VAE_ENCODER, Shape

Array = NDArray[Any]
Draw = Callable[[np.random.Generator, Shape], Array]


class Inputs:
    """Draws the inputs of one network."""

    def __init__(self, network: str, manifest: Mapping[str, Any], repository: Path) -> None:
        self._draws: dict[str, Draw] = {
            "timestep": _uniform(0.0, last_timestep(manifest["noise_schedule"])),
            "time_ids": _uniform(0.0, float(manifest["limits"]["max_size"])),
            "controlnet_cond": _uniform(0.0, 1.0),
            "conditioning_scale": _uniform(0.0, 2.0),
        }
        if network == VAE_ENCODER:
            self._draws["sample"] = _uniform(-1.0, 1.0)
        for encoder in manifest["text"]["encoders"]:
            if encoder["network"] == network or network in _variants_of(encoder, manifest):
                self._draws["input_ids"] = _tokens(encoder["tokenizer"], repository)

    def draw(self, shapes: Mapping[str, Shape], seed: int) -> dict[str, Array]:
        """One call's inputs; what is not known by name is normal noise, float32."""
        generator = np.random.default_rng(seed)
        return {
            name: self._draws.get(name, _normal)(generator, shape) for name, shape in shapes.items()
        }


def last_timestep(noise_schedule: Mapping[str, Any]) -> float:
    """The noisiest that the denoiser was trained on."""
    if "train_sigmas" in noise_schedule:
        return len(noise_schedule["train_sigmas"]) - 1.0
    return float(noise_schedule["num_train_timesteps"])


def _variants_of(encoder: Mapping[str, Any], manifest: Mapping[str, Any]) -> list[str]:
    return [
        variant[encoder["network"]]
        for variant in manifest["variants"].values()
        if encoder["network"] in variant
    ]


def _normal(generator: np.random.Generator, shape: Shape) -> Array:
    return generator.standard_normal(shape, np.float32)


def _uniform(low: float, high: float) -> Draw:
    return lambda generator, shape: generator.uniform(low, high, shape).astype(np.float32)


def _tokens(tokenizer: Mapping[str, Any], repository: Path) -> Draw:
    """Texts of all lengths: a beginning where there is one, words, an end, and what fills up."""
    size = Tokenizer.from_file(str(repository / tokenizer["file"])).get_vocab_size()
    begin, end, pad = (tokenizer[f"{name}_token_id"] for name in ("bos", "eos", "pad"))

    def draw(generator: np.random.Generator, shape: Shape) -> Array:
        ids = generator.integers(0, size, shape, np.int64)
        # Some encoders find the end by its number, of which there is to be one only.
        ids[ids == end] = 0
        if begin is not None:
            ids[:, 0] = begin
        for row, length in zip(ids, generator.integers(1, shape[1], shape[0]), strict=True):
            row[length] = end
            row[length + 1 :] = end if pad is None else pad
        return ids

    return draw
