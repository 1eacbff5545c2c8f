"""The synchronous client against a fake Triton, over gRPC and HTTP."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
import pytest
from fake_triton import INFO, TIMINGS, FakeTriton, encode_latents, encode_picture, paint

from darkroom import (
    Client,
    DarkroomError,
    InvalidRequest,
    Latents,
    Picture,
    QueueFull,
    RequestCancelled,
    RequestTimeout,
    ServerError,
    ServerUnavailable,
)

WAIT_S = 30.0


@pytest.fixture(params=["grpc", "http"])
def client(request: pytest.FixtureRequest, triton: FakeTriton) -> Iterator[Client]:
    url = {"grpc": triton.grpc_url, "http": triton.http_url}[request.param]
    with Client(url, timeout=WAIT_S) as client:
        yield client


def test_one_picture(client: Client) -> None:
    picture = client.generate("a cat", seed=7, width=32, height=24)

    assert isinstance(picture, Picture)
    assert (picture.size, picture.seed, picture.getpixel((0, 0))) == ((32, 24), 7, (7, 20, 30))
    assert (picture.model, picture.timings, picture.notes) == ("fake", TIMINGS, [])


def test_a_list_of_pictures_where_their_number_is_given(client: Client) -> None:
    pictures = client.generate("a cat", seed=7, num_images_per_prompt=3)

    assert [picture.seed for picture in pictures] == [7, 8, 9]


def test_a_list_of_one_is_a_list(client: Client) -> None:
    pictures = client.generate("a cat", seed=7, num_images_per_prompt=1)

    assert [picture.seed for picture in pictures] == [7]


def test_options_reach_the_server(client: Client, triton: FakeTriton) -> None:
    client.generate(
        "ein Bär ☃",
        negative_prompt="",
        num_inference_steps=4,
        guidance_scale=1.5,
        seed=0,
        guidance_rescale=0.5,
        guidance_start=0.25,
        guidance_stop=0.75,
        sampler="ddim",
        eta=1,
        timestep_spacing="trailing",
        clip_skip=1,
        max_embeddings_multiples=3,
        priority=-3,
        timeout_ms=100,
        output_format="webp",
    )

    assert triton.requests == [
        {
            "prompt": "ein Bär ☃",
            "negative_prompt": "",
            "num_inference_steps": 4,
            "guidance_scale": 1.5,
            "seed": 0,
            "guidance_rescale": 0.5,
            "guidance_start": 0.25,
            "guidance_stop": 0.75,
            "sampler": "ddim",
            "eta": 1.0,
            "timestep_spacing": "trailing",
            "clip_skip": 1,
            "max_embeddings_multiples": 3,
            "priority": -3,
            "timeout_ms": 100,
            "output_format": "webp",
        }
    ]


def test_pictures_and_adapters_reach_the_server(client: Client, triton: FakeTriton) -> None:
    picture = encode_picture(7)
    client.generate(
        "a cat",
        seed=1,
        image=picture,
        mask_image=picture,
        strength=0.5,
        original_size=(512, 768),
        crops_coords_top_left=(0, 8),
        target_size=(256, 384),
        aesthetic_score=7,
        negative_aesthetic_score=1.5,
        controlnet=["canny", "depth"],
        control_image=[picture, picture],
        controlnet_conditioning_scale=[0.5, 1],
        control_guidance_start=0.25,
        control_guidance_end=0.75,
        lora={"ink": 0.75},
        variant="watercolor",
    )

    assert triton.requests == [
        {
            "prompt": "a cat",
            "seed": 1,
            "image": picture,
            "mask_image": picture,
            "strength": 0.5,
            "original_size": [512, 768],
            "crops_coords_top_left": [0, 8],
            "target_size": [256, 384],
            "aesthetic_score": 7.0,
            "negative_aesthetic_score": 1.5,
            "controlnet": ["canny", "depth"],
            "control_image": [picture, picture],
            "controlnet_conditioning_scale": [0.5, 1.0],
            "control_guidance_start": [0.25, 0.25],
            "control_guidance_end": [0.75, 0.75],
            "lora": ["ink"],
            "lora_scale": [0.75],
            "variant": "watercolor",
        }
    ]


def test_another_call_goes_on_from_latents(client: Client, triton: FakeTriton) -> None:
    latents = client.generate_latents("a cat", seed=7, denoising_end=0.75)
    client.generate("a cat", image=latents, denoising_start=0.75, seed=latents.seed)

    assert isinstance(latents, Latents)
    assert (latents.array.shape, latents.seed, latents.info["model"]) == ((4, 1, 2), 7, "fake")
    assert triton.requests == [
        {"prompt": "a cat", "seed": 7, "denoising_end": 0.75, "output_format": "latent"},
        {"prompt": "a cat", "seed": 7, "denoising_start": 0.75, "image": encode_latents(7)},
    ]


@pytest.mark.parametrize("count", [1, 2])
def test_a_list_of_latents_where_their_number_is_given(client: Client, count: int) -> None:
    latents = client.generate_latents("a cat", seed=7, num_images_per_prompt=count)

    assert [it.seed for it in latents] == [7, 8][:count]


def test_pictures_in_the_place_of_latents_are_a_server_error(
    client: Client, triton: FakeTriton
) -> None:
    triton.answer = lambda fields: paint({**fields, "output_format": "png"})

    with pytest.raises(ServerError, match="the server's answer cannot be read"):
        client.generate_latents("a cat")


def test_the_seed_that_was_chosen_is_told(client: Client, triton: FakeTriton) -> None:
    picture = client.generate("a cat")

    assert picture.seed == triton.requests[0]["seed"]
    assert client.generate("a cat").seed != picture.seed


@pytest.mark.parametrize(
    ("code", "message", "error"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, "width: 3 is out of range", InvalidRequest),
        (grpc.StatusCode.NOT_FOUND, "unknown model", ServerUnavailable),
        (grpc.StatusCode.UNAVAILABLE, "the queue is full: 9 pictures are waiting", QueueFull),
        (grpc.StatusCode.UNAVAILABLE, "Server not ready", ServerUnavailable),
        (grpc.StatusCode.CANCELLED, "the request was cancelled", RequestCancelled),
        (grpc.StatusCode.CANCELLED, "timeout_ms: 50 ran out", RequestTimeout),
        (grpc.StatusCode.INTERNAL, "unet failed: out of memory", ServerError),
    ],
)
def test_an_error_of_the_server_is_raised_and_the_next_request_is_served(
    client: Client,
    triton: FakeTriton,
    code: grpc.StatusCode,
    message: str,
    error: type[DarkroomError],
) -> None:
    triton.failure = (code, message)

    with pytest.raises(DarkroomError, match=message) as caught:
        client.generate("a cat")
    assert type(caught.value) is error
    triton.failure = None
    assert client.generate("a cat", seed=1).seed == 1


def test_what_is_wrong_by_itself_is_not_sent(client: Client, triton: FakeTriton) -> None:
    with pytest.raises(InvalidRequest, match="width: 'wide' is not a whole int32"):
        client.generate("a cat", width="wide")
    with pytest.raises(TypeError, match="'steps' is not an option"):
        client.generate("a cat", steps=4)
    with pytest.raises(TypeError, match="'steps' is not an option"):
        client.generate_latents("a cat", steps=4)
    with pytest.raises(InvalidRequest, match=r"^image: no-such\.png: No such file"):
        client.generate("a cat", image="no-such.png")
    with pytest.raises(InvalidRequest, match="use generate_latents"):
        client.generate("a cat", output_format="latent")

    assert triton.requests == []


@pytest.mark.parametrize("count", [None, 2])
def test_an_answer_without_pictures_is_a_server_error(
    client: Client, triton: FakeTriton, count: int | None
) -> None:
    def nothing(fields: dict[str, Any]) -> dict[str, np.ndarray]:
        return {**paint(fields), "image": np.array([], object), "seed": np.array([], np.int64)}

    triton.answer = nothing

    with pytest.raises(ServerError, match="the server's answer cannot be read"):
        client.generate("a cat", num_images_per_prompt=count)


def test_an_answer_of_another_kind_is_a_server_error(client: Client, triton: FakeTriton) -> None:
    triton.answer = lambda _: {"logits": np.zeros((1, 1000), np.float32)}

    with pytest.raises(ServerError, match="the server's answer cannot be read"):
        client.generate("a cat")


def test_notes_of_the_server_are_told(client: Client, triton: FakeTriton) -> None:
    def truncated(fields: dict[str, Any]) -> dict[str, np.ndarray]:
        info = {**INFO, "notes": ["prompt: too long"]}
        return {**paint(fields), "info": np.array([json.dumps(info).encode()], object)}

    triton.answer = truncated

    assert client.generate("a cat").notes == ["prompt: too long"]


def test_ready_means_that_the_model_is_loaded(client: Client, triton: FakeTriton) -> None:
    assert client.is_ready()
    triton.models.clear()
    assert not client.is_ready()


@pytest.mark.parametrize("kind", ["grpc", "http"])
def test_another_model_is_asked_if_named(triton: FakeTriton, kind: str) -> None:
    url = {"grpc": triton.grpc_url, "http": triton.http_url}[kind]
    with Client(url, model="sdxl") as client:
        assert not client.is_ready()
        triton.models.add("sdxl")
        assert client.is_ready()


def test_a_model_that_is_not_there_is_server_unavailable(triton: FakeTriton) -> None:
    with (
        Client(triton.grpc_url, model="sdxl") as client,
        pytest.raises(ServerUnavailable, match="unknown model: 'sdxl'"),
    ):
        client.generate("a cat")


def test_threads_share_a_client(triton: FakeTriton) -> None:
    with Client(triton.grpc_url) as client, ThreadPoolExecutor(6) as pool:
        seeds = list(pool.map(lambda n: client.generate("a cat", seed=n).seed, range(24)))

    assert seeds == list(range(24))


def test_closing_twice_is_harmless(triton: FakeTriton) -> None:
    for url in (triton.grpc_url, triton.http_url):
        with Client(url) as client:
            client.close()
        client.close()


def test_leaving_the_context_closes_the_connection_whatever_happened(triton: FakeTriton) -> None:
    with pytest.raises(TypeError), Client(triton.grpc_url) as client:
        client.generate("a cat", steps=4)

    with pytest.raises(ValueError, match="closed channel"):
        client.generate("a cat")
