"""The networks alone: how many operations they take, and how long their calls take by rows."""

import gc
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import diffusers
import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu.clock import Clock
from benchmarks.gpu.models import Model, read_manifest
from darkroom_engine import Networks
from darkroom_engine.torch_networks import TorchNetworks
from darkroom_settings import TorchSettings

LOAD_TIMEOUT_S = 600.0
CONFIGURATIONS = {
    "graphs": {},
    "eager": {"cuda_graphs": 0},
    "compile": {"compile": 1},
}
"""How our networks may run: what differs from the default settings."""


def torch_networks(model: Model, configuration: str, max_rows: int) -> TorchNetworks:
    """A model's networks in this process, not yet loaded."""
    buckets = tuple(n for n in TorchSettings.row_buckets if n <= max_rows)
    settings = TorchSettings(
        device=model.device, row_buckets=buckets, **CONFIGURATIONS[configuration]
    )
    return TorchNetworks.on(model.manifest(), settings)


@contextmanager
def loaded(
    model: Model, configuration: str, max_rows: int, names: Sequence[str]
) -> Iterator[TorchNetworks]:
    """Some of a model's networks, for the time of the block."""
    networks = torch_networks(model, configuration, max_rows)
    networks.wait_until_ready(names, LOAD_TIMEOUT_S, lambda: False)
    try:
        yield networks
    finally:
        del networks
        free_memory()


def free_memory() -> None:
    """Give back what nothing refers to any more, to the device too."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@dataclass(frozen=True)
class Operations:
    """Floating-point operations of one row, two for each multiplication with an addition."""

    denoiser: int
    decoder: int

    def record(self) -> dict[str, Any]:
        return {
            "denoiser_tflop": round(self.denoiser / 1e12, 6),
            "decoder_tflop": round(self.decoder / 1e12, 6),
        }


def count_operations(model: Model) -> Operations:
    """Count those of a row, by PyTorch's counter, without weights and without computing."""
    sizes = Sizes.of(model)
    with torch.device("meta"), torch.no_grad():
        unet = diffusers.UNet2DConditionModel.from_config(_config(model, "unet"))
        with FlopCounterMode(display=False) as counter:
            unet(*_arguments(sizes), return_dict=False)
        denoiser = counter.get_total_flops()
        vae = diffusers.AutoencoderKL.from_config(_config(model, "vae"))
        with FlopCounterMode(display=False) as counter:
            vae.decode(torch.empty(1, *sizes.latents), return_dict=False)
        return Operations(denoiser, counter.get_total_flops())


@dataclass(frozen=True)
class Sizes:
    """The shapes of a row at the model's default size."""

    latents: tuple[int, int, int]
    hidden_size: int
    pooled_size: int | None
    num_time_ids: int

    @classmethod
    def of(cls, model: Model) -> "Sizes":
        """As the manifest says."""
        manifest = read_manifest(model)
        limits, latents = manifest["limits"], manifest["latents"]
        factor = latents["vae_scale_factor"]
        unet = _config(model, "unet")
        num_ids = 2 * len(manifest["denoiser"]["time_ids"])
        pooled = None
        if num_ids:
            pooled = unet["projection_class_embeddings_input_dim"]
            pooled -= num_ids * unet["addition_time_embed_dim"]
        shape = (
            latents["channels"],
            limits["default_height"] // factor,
            limits["default_width"] // factor,
        )
        return cls(shape, manifest["text"]["hidden_size"], pooled, num_ids)

    def inputs(self, num_rows: int, networks: Networks) -> dict[str, Any]:
        """Random inputs of a call with so many rows, where the networks take them."""
        chance = np.random.default_rng(num_rows)
        made = {
            "sample": chance.standard_normal((num_rows, *self.latents), np.float32),
            "timestep": np.linspace(10, 900, num_rows, dtype=np.float32),
            "encoder_hidden_states": chance.standard_normal(
                (num_rows, NUM_TOKENS, self.hidden_size), np.float32
            ),
        }
        if self.pooled_size is not None:
            pooled = chance.standard_normal((num_rows, self.pooled_size), np.float32)
            made |= {
                "text_embeds": pooled,
                "time_ids": np.zeros((num_rows, self.num_time_ids), np.float32),
            }
        return {name: networks.arrays.from_host(array) for name, array in made.items()}


NUM_TOKENS = 77


def denoiser_s(
    model: Model, networks: Networks, num_rows: int, clock: Clock, num_calls: int
) -> list[float]:
    """The time of calls of the denoiser with so many rows."""
    record = model.manifest().denoiser
    inputs = Sizes.of(model).inputs(num_rows, networks)
    return clock.calls_s(
        lambda: networks.run(record.network, inputs, [record.output]), num_calls, num_warmups=3
    )


def decoder_s(
    networks: Networks, latents: tuple[int, int, int], clock: Clock, num_calls: int
) -> list[float]:
    """The time until a picture is decoded and on the host, as it is called."""
    chance = np.random.default_rng(0)
    inputs = {"latent_sample": chance.standard_normal((1, *latents), np.float32)}
    networks.run("vae_decoder", inputs, ["sample"])
    return [
        clock.host_s(lambda: networks.run("vae_decoder", inputs, ["sample"]))
        for _ in range(num_calls)
    ]


def _arguments(sizes: Sizes) -> tuple[Any, ...]:
    hidden = torch.empty(1, NUM_TOKENS, sizes.hidden_size)
    arguments: tuple[Any, ...] = (torch.empty(1, *sizes.latents), torch.empty(1), hidden)
    if sizes.pooled_size is None:
        return arguments
    added = {
        "text_embeds": torch.empty(1, sizes.pooled_size),
        "time_ids": torch.empty(1, sizes.num_time_ids),
    }
    return (*arguments, None, None, None, None, added)


def _config(model: Model, part: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((model.checkpoint / part / "config.json").read_text())
    return config
