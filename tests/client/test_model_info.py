"""What a server tells of its models, over gRPC and HTTP, and for people."""

import asyncio
import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest
from fake_triton import MODEL_INFO, FakeTriton

from darkroom import AsyncClient, Client, InvalidRequest, ModelInfo, ServerError, ServerUnavailable
from darkroom.model_text import model_text

REFINER = {**MODEL_INFO, "model": "refiner", "family": "sdxl-refiner", "modes": ["img2img"]}

Ask = Callable[..., Any]


@pytest.fixture(params=["grpc", "http", "asyncio"])
def info(request: pytest.FixtureRequest, triton: FakeTriton) -> Ask:
    """`info` of a client of each kind."""

    def ask(*arguments: Any) -> Any:
        url = triton.http_url if request.param == "http" else triton.grpc_url
        with Client(url) as client:
            return client.info(*arguments)

    async def ask_async(*arguments: Any) -> Any:
        async with AsyncClient(triton.grpc_url) as client:
            return await client.info(*arguments)

    if request.param == "asyncio":
        return lambda *arguments: asyncio.run(ask_async(*arguments))
    return ask


def test_all_models_are_told(triton: FakeTriton, info: Ask) -> None:
    triton.catalog = [MODEL_INFO, REFINER]
    first, second = info()

    assert first == ModelInfo(
        model="stable_diffusion",
        name="shapes",
        family="sd1",
        engine="0123",
        modes=("text2img", "img2img"),
        samplers=("unipc", "euler"),
        limits={"min_size": 32, "max_size": 128},
        controlnets=("canny",),
        loras=(),
        variants=(),
        safety_checker="off",
        raw=MODEL_INFO,
    )
    assert (second.model, second.family, second.modes) == ("refiner", "sdxl-refiner", ("img2img",))


def test_one_model_is_told_by_its_name(triton: FakeTriton, info: Ask) -> None:
    triton.catalog = [MODEL_INFO, REFINER]

    assert info("refiner").family == "sdxl-refiner"
    with pytest.raises(InvalidRequest, match=r"^model: 'sdxl' does not exist"):
        info("sdxl")


def test_a_server_may_have_no_models(triton: FakeTriton, info: Ask) -> None:
    triton.catalog = []

    assert info() == []


def test_what_a_newer_server_adds_is_kept(info: Ask) -> None:
    assert info("stable_diffusion").raw["weather"] == "fine"


def test_names_may_come_with_what_is_known_of_them(triton: FakeTriton, info: Ask) -> None:
    triton.catalog = [{**MODEL_INFO, "loras": {"ink": {"rank": 8}}}]

    assert info("stable_diffusion").loras == ("ink",)


@pytest.mark.parametrize("name", [7, b"sdxl", "\ud800"])
def test_a_name_that_is_no_text_is_refused(info: Ask, name: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"^model: .* is not a text"):
        info(name)


def test_a_server_that_tells_nothing_is_server_unavailable(triton: FakeTriton, info: Ask) -> None:
    triton.models.discard("darkroom")

    with pytest.raises(ServerUnavailable, match="unknown model: 'darkroom'"):
        info()


@pytest.mark.parametrize(
    "model",
    [
        3,
        None,
        {name: value for name, value in MODEL_INFO.items() if name != "engine"},
        {name: value for name, value in MODEL_INFO.items() if name != "safety_checker"},
        {**MODEL_INFO, "name": None},
        {**MODEL_INFO, "modes": "text2img"},
        {**MODEL_INFO, "samplers": [1]},
        {**MODEL_INFO, "limits": []},
        {**MODEL_INFO, "safety_checker": True},
    ],
)
def test_a_malformed_model_is_a_server_error(triton: FakeTriton, info: Ask, model: Any) -> None:
    triton.catalog = [model]

    with pytest.raises(ServerError, match="the server's answer cannot be read: "):
        info()


def test_more_than_one_model_of_a_name_is_a_server_error(triton: FakeTriton, info: Ask) -> None:
    triton.catalog = [MODEL_INFO, MODEL_INFO]

    with pytest.raises(ServerError, match="the server's answer cannot be read: "):
        info("stable_diffusion")


def test_it_is_frozen() -> None:
    told = ModelInfo.from_raw(MODEL_INFO)

    with pytest.raises(dataclasses.FrozenInstanceError):
        told.name = "else"
    assert json.dumps(told.raw)


def test_an_older_server_does_not_say_what_runs_its_networks() -> None:
    assert "  backends        unknown\n" in model_text(ModelInfo.from_raw(MODEL_INFO))


def test_the_text_has_all_facts_in_lines_that_are_not_long() -> None:
    many = [f"sampler-{number}" for number in range(20)]
    text = model_text(
        ModelInfo.from_raw(
            {**MODEL_INFO, "samplers": many, "safety_checker": "flag", "backends": ["torch"]}
        )
    )

    first, *lines = text.splitlines()
    assert first == "stable_diffusion"
    assert lines[:4] == [
        "  checkpoint      shapes, sd1",
        "  engine          0123",
        "  backends        torch",
        "  modes           text2img, img2img",
    ]
    assert lines[-5:] == [
        "  limits          max_size 128, min_size 32",
        "  controlnets     canny",
        "  loras           none",
        "  variants        none",
        "  safety checker  flag",
    ]
    assert all(len(line) <= 88 for line in lines)
    assert [word.strip(" ,") for word in text.split() if word.startswith("sampler-")] == many
