"""Pictures from a real server: right, repeatable, and the same whatever the neighbours."""

import asyncio
import contextlib
import json
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
from PIL import Image
from pixels import levels
from server_checkpoint import CHECKPOINT

from darkroom import AsyncClient, Client, DarkroomError, Picture
from darkroom.server import Server
from shapes.classify import classify

SAMPLERS = (
    *("unipc", "dpmpp_2m_karras", "euler", "dpmpp_2m_sde", "ddim", "lcm", "euler_ancestral", "tcd"),
    *("dpmpp_sde", "unipc_karras", "dpmpp_2m"),
)

REQUESTS: list[dict[str, Any]] = [
    {
        "prompt": f"a large {colour} {shape} on a {background} background",
        "num_inference_steps": 4 + (36 * n) // 15,
        "guidance_scale": [0.0, 1.0, 7.0][n % 3],
        "seed": n,
        "sampler": SAMPLERS[n % len(SAMPLERS)],
        "guidance_rescale": [0.0, 0.7][n % 4 == 1],
        "guidance_stop": [1.0, 0.6][n % 5 == 2],
        "clip_skip": [0, 1][n % 7 == 3],
    }
    for n, (colour, shape, background) in enumerate(
        [
            ("red", "circle", "blue"),
            ("green", "square", "white"),
            ("blue", "triangle", "yellow"),
            ("yellow", "star", "black"),
        ]
        * 4
    )
]


def ask_together(client: Client, requests: list[dict[str, Any]]) -> list[Picture]:
    with ThreadPoolExecutor(len(requests)) as pool:
        return list(pool.map(lambda fields: client.generate(**fields), requests))


def test_concurrent_requests_make_their_solo_pictures(client: Client) -> None:
    solo = [client.generate(**fields) for fields in REQUESTS]

    together = ask_together(client, REQUESTS)

    for fields, alone, crowded in zip(REQUESTS, solo, together, strict=True):
        assert crowded.seed == fields["seed"]
        assert np.abs(levels(alone) - levels(crowded)).max() <= 1, fields


def test_a_picture_is_the_same_after_a_reload(server: Server, client: Client) -> None:
    request = {"prompt": "a red circle", "seed": 2, "sampler": "euler_ancestral"}
    before = client.generate(**request)
    with tritonclient.grpc.InferenceServerClient(server.grpc_url) as triton:
        triton.unload_model("stable_diffusion")
        wait_until(lambda: not triton.is_model_ready("stable_diffusion"))
        triton.load_model("stable_diffusion")

    assert client.generate(**request).encoded == before.encoded
    # The other faces find the new engine.
    *_, done = client.stream(**request)
    assert done.pictures[0].encoded == before.encoded
    assert not client.cancel("nobody")


def test_a_reload_under_load_loses_nobody(server: Server, client: Client) -> None:
    """The new instance is there before the old one has ended what it has."""
    request = {"prompt": "a red circle", "num_inference_steps": 60}
    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(client.generate, **request, seed=seed) for seed in range(4)]
        stream = client.stream(**request)
        next(stream)
        with tritonclient.grpc.InferenceServerClient(server.grpc_url) as triton:
            triton.unload_model("stable_diffusion")
            triton.load_model("stable_diffusion")
        outcomes = [future.exception(60) for future in futures]

    # Ended or refused, but answered; and the server lives.
    assert all(isinstance(outcome, DarkroomError | None) for outcome in outcomes)
    with contextlib.suppress(DarkroomError):
        list(stream)
    assert client.generate("a red circle").size
    *_, done = client.stream("a red circle")
    assert done.pictures

    def publishes() -> bool:
        text = urllib.request.urlopen(server.metrics_url, timeout=60).read().decode()
        return 'darkroom_requests_total{model="stable_diffusion",outcome="image"}' in text

    wait_until(publishes)


def wait_until(condition: Callable[[], bool]) -> None:
    give_up_at = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < give_up_at
        time.sleep(0.05)


def test_equal_requests_at_once_make_equal_pictures(client: Client) -> None:
    request = {"prompt": "a small green star on a white background", "seed": 5}

    pictures = ask_together(client, [request] * 5)

    assert len({picture.encoded for picture in pictures}) == 1


def test_seed_zero_is_a_seed(client: Client) -> None:
    first, again, other = (client.generate("a red circle", seed=seed) for seed in (0, 0, 1))

    assert first.encoded == again.encoded
    assert (levels(first) != levels(other)).any()


def test_a_request_without_a_seed_tells_which_it_took(client: Client) -> None:
    picture = client.generate("a red circle")

    assert client.generate("a red circle", seed=picture.seed).encoded == picture.encoded


@pytest.mark.torch
@pytest.mark.parametrize(
    ("num_inference_steps", "guidance_scale", "negative_prompt"),
    [(20, 5.0, ""), (7, 7.5, "a blue background"), (4, 1.0, ""), (1, 3.0, "")],
)
def test_the_picture_is_that_of_the_diffusers_pipeline(
    client: Client, num_inference_steps: int, guidance_scale: float, negative_prompt: str
) -> None:
    """The same seed is enough: the noise is that of PyTorch's CPU generator."""
    import torch
    from diffusers import StableDiffusionPipeline, UniPCMultistepScheduler

    pipeline = StableDiffusionPipeline.from_pretrained(CHECKPOINT).to(torch.float32)
    pipeline.scheduler = UniPCMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    fields = {
        "prompt": "a large yellow square on a black background",
        "negative_prompt": negative_prompt,
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
    }
    generator = torch.Generator("cpu").manual_seed(123)
    expected = pipeline(**fields, generator=generator).images[0]

    served = client.generate(**fields, seed=123)

    assert np.abs(levels(expected) - levels(served)).mean() <= 1


@pytest.mark.torch
@pytest.mark.parametrize(
    ("sampler", "scheduler", "config", "fields"),
    [
        ("dpmpp_2m", "DPMSolverMultistepScheduler", {}, {}),
        ("dpmpp_2m_karras", "DPMSolverMultistepScheduler", {"use_karras_sigmas": True}, {}),
        ("euler", "EulerDiscreteScheduler", {"timestep_spacing": "trailing"}, {}),
        ("euler_ancestral", "EulerAncestralDiscreteScheduler", {}, {"guidance_rescale": 0.7}),
        ("ddim", "DDIMScheduler", {"timestep_spacing": "trailing"}, {"eta": 0.7}),
        ("tcd", "TCDScheduler", {}, {"eta": 0.3, "guidance_scale": 1.0}),
    ],
)
def test_the_pictures_of_other_samplers_are_those_of_diffusers(
    client: Client, sampler: str, scheduler: str, config: dict[str, Any], fields: dict[str, Any]
) -> None:
    import diffusers
    import torch

    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(CHECKPOINT).to(torch.float32)
    options = {**config, **({"clip_sample": False} if sampler == "ddim" else {})}
    pipeline.scheduler = getattr(diffusers, scheduler).from_config(
        pipeline.scheduler.config, **options
    )
    pipeline.set_progress_bar_config(disable=True)
    request = {
        "prompt": "a large yellow square on a black background",
        "num_inference_steps": 8,
        "guidance_scale": 5.0,
        **fields,
    }
    generator = torch.Generator("cpu").manual_seed(4)
    expected = pipeline(**request, generator=generator).images[0]

    spacing = config.get("timestep_spacing")
    served = client.generate(**request, sampler=sampler, timestep_spacing=spacing, seed=4)

    assert np.abs(levels(expected) - levels(served)).mean() <= 1


def test_a_weight_moves_the_picture_and_a_weight_of_one_does_not(client: Client) -> None:
    fields = {"seed": 1, "num_inference_steps": 8}
    plain, one, heavy, literal = (
        client.generate(prompt, **fields)
        for prompt in (
            "a large red circle",
            "a large (red:1.0) circle",
            "a large (red:1.6) circle",
            r"a large \(red\) circle",
        )
    )

    assert (levels(plain) == levels(one)).all()
    for other in (heavy, literal):
        assert (levels(plain) != levels(other)).any()


def test_a_long_prompt_is_read_whole_on_request(client: Client) -> None:
    """What lies beyond the first 75 tokens counts only then."""
    padding = "a small picture " * 30
    fields = {"seed": 1, "num_inference_steps": 8}
    cut, whole = (
        [client.generate(padding + end, **fields, max_embeddings_multiples=n) for end in ENDS]
        for n in (1, 4)
    )

    assert (levels(cut[0]) == levels(cut[1])).all()
    assert (levels(whole[0]) != levels(whole[1])).any()
    assert cut[0].notes
    assert not whole[0].notes


ENDS = ("a large red circle", "a large blue square")


@pytest.mark.parametrize(
    ("colour", "shape", "background"),
    [
        ("red", "circle", "blue"),
        ("white", "square", "green"),
        ("yellow", "triangle", "black"),
        ("blue", "star", "white"),
    ],
)
def test_the_picture_shows_what_the_prompt_says(
    client: Client, colour: str, shape: str, background: str
) -> None:
    prompt = f"a large {colour} {shape} on a {background} background"

    picture = client.generate(prompt, seed=1, num_inference_steps=20, guidance_scale=5.0)

    seen = classify(picture)
    assert (seen.colour, seen.shape, seen.background) == (colour, shape, background)


def test_pictures_of_one_request_use_consecutive_seeds(client: Client) -> None:
    pictures = client.generate("a red circle", seed=10, num_images_per_prompt=3)

    assert [picture.seed for picture in pictures] == [10, 11, 12]
    assert pictures[2].encoded == client.generate("a red circle", seed=12).encoded


def test_sizes_beside_the_default_are_served(client: Client) -> None:
    picture = client.generate("a red circle", width=192, height=128, num_inference_steps=4)

    assert picture.size == (192, 128)


def test_a_picture_carries_its_provenance(client: Client, tmp_path: Path) -> None:
    picture = client.generate("a red circle ☃", seed=3, num_inference_steps=4)
    (tmp_path / "a.png").write_bytes(picture.encoded)

    with Image.open(tmp_path / "a.png") as opened:
        facts = json.loads(opened.text["darkroom"])
        assert "Steps: 4, Sampler: unipc" in opened.text["parameters"]
    assert facts["prompt"] == "a red circle ☃"
    assert (facts["seed"], facts["num_inference_steps"]) == (3, 4)


def test_a_long_prompt_is_served_with_a_note(client: Client) -> None:
    picture = client.generate("a red circle " * 60, num_inference_steps=2)

    (note,) = picture.notes
    assert note.startswith("prompt: too long, its last ")


def test_timings_are_told(client: Client) -> None:
    timings = client.generate("a red circle", num_inference_steps=4).timings

    assert set(timings) == {"queue_ms", "denoise_ms", "decode_ms", "total_ms"}
    assert timings["total_ms"] >= timings["denoise_ms"] > 0


def test_a_newcomer_gets_its_first_step_within_two_of_the_running_batch(client: Client) -> None:
    with ThreadPoolExecutor() as pool:
        long = pool.submit(
            client.generate, "a red circle", num_inference_steps=150, width=256, height=128
        )
        waits = []
        while not long.done():
            newcomer = client.generate(
                "a red circle", num_inference_steps=2, width=256, height=128, seed=0
            )
            waits.append(newcomer.queue_steps)

    assert len(waits) > 2
    assert max(waits) <= 2


@pytest.mark.parametrize("output_format", ["jpeg", "webp"])
def test_other_formats_are_served(client: Client, output_format: str) -> None:
    picture = client.generate("a red circle", output_format=output_format, num_inference_steps=2)

    with Image.open(BytesIO(picture.encoded)) as opened:
        assert opened.format == output_format.upper()


def test_http_gives_the_picture_that_grpc_gives(client: Client, server: Server) -> None:
    with Client(server.http_url) as http:
        assert http.is_ready()
        over_http = http.generate("a red circle", seed=4)

    assert over_http.encoded == client.generate("a red circle", seed=4).encoded


def test_the_async_client_runs_requests_together(client: Client, server: Server) -> None:
    async def ask() -> list[list[Picture]]:
        async with AsyncClient(server.grpc_url) as asynchronous:
            assert await asynchronous.is_ready()
            tasks = [asynchronous.generate("a red circle", seed=seed) for seed in range(4)]
            return await asyncio.gather(*tasks)

    pictures = [only for (only,) in asyncio.run(ask())]

    assert [picture.seed for picture in pictures] == [0, 1, 2, 3]
    assert pictures[2].encoded == client.generate("a red circle", seed=2).encoded
