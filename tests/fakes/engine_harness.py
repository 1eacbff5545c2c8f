"""Fixtures: an engine over fake networks, and a few words to talk with it."""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_networks import HIDDEN, FakeNetworks
from tiny_tokenizers import write_byte_tokenizer

from darkroom_engine import Engine, EngineConfig, ImageRequest, Job, JobResult, Manifest
from darkroom_engine.request import Limits

LIMITS = Limits(
    samplers=("unipc", "unipc_karras"),
    default_sampler="unipc",
    default_width=512,
    default_height=512,
    default_num_inference_steps=25,
    default_guidance_scale=7.5,
    size_multiple=64,
    min_size=128,
    max_size=1024,
    max_num_inference_steps=150,
    max_guidance_scale=50.0,
    max_num_images_per_prompt=8,
    max_clip_skip=11,
    max_embeddings_multiples=4,
)

WAIT_S = 30.0
"""Far above what any answer takes; only a hang reaches it."""


@pytest.fixture(scope="session")
def manifest_document() -> dict[str, Any]:
    """A manifest as an export writes it, of no networks on disk."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    alphas_cumprod = np.cumprod(1 - betas)
    verification = {"error": 1e-6, "tolerance": 1e-4}
    names = ("text_encoder", "unet", "vae_decoder", "vae_encoder")
    return {
        "format": 4,
        "name": "fake",
        "family": "sd1",
        "precision": "fp32",
        "latents": {
            "channels": 4,
            "vae_scale_factor": 8,
            "vae_scaling_factor": 0.18215,
            "vae_shift_factor": 0.0,
        },
        "preview": {
            "matrix": [[0.4, 0.1, 0.0], [0.0, 0.4, 0.1], [0.1, 0.0, 0.4], [0.1, 0.1, 0.1]],
            "bias": [0.0, 0.1, 0.2],
            "r2": 0.9,
        },
        "noise_schedule": {
            "train_sigmas": np.sqrt((1 - alphas_cumprod) / alphas_cumprod).tolist(),
            "prediction_type": "epsilon",
            "timestep_spacing": "linspace",
            "steps_offset": 0,
        },
        "solver": {"solver_order": 2, "solver_type": "bh2"},
        "text": {
            "encoders": [
                {
                    "network": "text_encoder",
                    "kind": "clip",
                    "tokenizer": {
                        "file": "tokenizer/tokenizer.json",
                        "max_length": 77,
                        "bos_token_id": 300,
                        "eos_token_id": 301,
                        "pad_token_id": 301,
                    },
                    "hidden": "last_hidden_state",
                    "layers": "hidden_states",
                    "pooled": None,
                }
            ],
            "hidden_size": HIDDEN,
            "pooled_input": None,
            "empty_negative": "encode",
            "num_blank_tokens": 0,
        },
        "denoiser": {
            "network": "unet",
            "sample": "sample",
            "output": "out_sample",
            "extra_channels": 0,
            "time_ids": [],
            "guidance_embedding_size": 0,
            "residuals": [],
        },
        "controlnets": {},
        "loras": {},
        "variants": {},
        "safety_checker": None,
        "limits": {
            "default_width": 64,
            "default_height": 64,
            "default_num_inference_steps": 8,
            "default_guidance_scale": 5.0,
            "size_multiple": 16,
            "min_size": 32,
            "max_size": 128,
            "max_num_inference_steps": 60,
            "max_guidance_scale": 20.0,
            "max_num_images_per_prompt": 4,
            "max_clip_skip": 2,
            "default_sampler": "unipc",
            "max_embeddings_multiples": 4,
        },
        "networks": {
            name: {
                "backend": "python",
                "files": {},
                "outputs": ["out"],
                "max_batch_size": 63,
                "verification": verification,
            }
            for name in names
        },
    }


@pytest.fixture
def repository(tmp_path: Path, manifest_document: dict[str, Any]) -> Path:
    """A repository with a manifest and a byte-level tokenizer."""
    write_byte_tokenizer(tmp_path / "tokenizer" / "tokenizer.json")
    (tmp_path / "manifest.json").write_text(json.dumps(manifest_document))
    return tmp_path


@pytest.fixture
def manifest(repository: Path) -> Manifest:
    return Manifest.load(repository / "manifest.json")


@pytest.fixture
def networks() -> FakeNetworks:
    return FakeNetworks()


def _raw(value: Any) -> Any:
    """A value as it arrives: texts as bytes, several as a tuple."""
    if isinstance(value, list | tuple):
        return tuple(_raw(one) for one in value)
    return value.encode() if isinstance(value, str) else value


class Harness:
    """An engine with its fake networks; `ask` submits and returns a future of the answer."""

    def __init__(self, manifest: Manifest, networks: FakeNetworks, config: EngineConfig) -> None:
        self.networks = networks
        self.engine = Engine(manifest, networks, config)
        self.answers: list[Any] = []

    def ask(self, prompt: str = "a cat", **fields: Any) -> "Future[JobResult]":
        return self.ask_job(prompt, **fields)[1]

    def ask_job(self, prompt: str = "a cat", **fields: Any) -> "tuple[Job, Future[JobResult]]":
        raw = {name: _raw(value) for name, value in fields.items()}
        request = ImageRequest.parse(
            {"prompt": prompt.encode(), "seed": 0, **raw}, self.engine.limits
        )
        future: Future[JobResult] = Future()

        def reply(answer: Any) -> None:
            self.answers.append(answer)
            if isinstance(answer, JobResult):
                future.set_result(answer)
            else:
                future.set_exception(answer)

        return self.engine.submit(request, reply), future

    def picture(self, prompt: str = "a cat", **fields: Any) -> bytes:
        return self.ask(prompt, **fields).result(WAIT_S).pictures[0]


@pytest.fixture
def make_engine(manifest: Manifest, networks: FakeNetworks) -> Iterator[Callable[..., Harness]]:
    engines: list[Engine] = []

    def make(**config: int) -> Harness:
        harness = Harness(manifest, networks, EngineConfig(**config))
        engines.append(harness.engine)
        harness.engine.start()
        return harness

    yield make
    networks.gate.set()
    networks.decode_gate.set()
    for engine in engines:
        engine.close()


@pytest.fixture
def harness(make_engine: Callable[..., Harness]) -> Harness:
    return make_engine()
