"""Triton's response cache: it answers equal requests without the engine, and no others."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from darkroom import Client, Picture
from darkroom.cli import main
from darkroom.server import Server, free_ports

REQUEST: dict[str, Any] = {
    "prompt": "a red circle",
    "negative_prompt": "blue",
    "num_inference_steps": 4,
    "guidance_scale": 5.0,
    "guidance_rescale": 0.0,
    "guidance_start": 0.0,
    "guidance_stop": 1.0,
    "clip_skip": 0,
    "max_embeddings_multiples": 1,
    "seed": 1,
    "width": 128,
    "height": 128,
    "sampler": "unipc",
    "output_format": "png",
}
OTHERS: dict[str, Any] = {
    "prompt": "a blue circle",
    "negative_prompt": "red",
    "num_inference_steps": 5,
    "guidance_scale": 6.0,
    "guidance_rescale": 0.7,
    "guidance_start": 0.5,
    "guidance_stop": 0.5,
    "clip_skip": 1,
    "seed": 2,
    "width": 192,
    "height": 192,
    "sampler": "euler",
    "output_format": "webp",
}


@pytest.fixture(scope="module")
def caching(repository: Path) -> Iterator[Client]:
    with (
        Server(repository, free_ports(), response_cache_bytes=2**26) as server,
        Client(server.grpc_url) as client,
    ):
        client.generate(**REQUEST)
        yield client


def is_cached(picture: Picture, earlier: Picture) -> bool:
    """The engine measures every request anew, so that equal times are an old answer's."""
    return picture.timings == earlier.timings


def test_an_equal_request_is_answered_without_the_engine(caching: Client) -> None:
    first, second = caching.generate(**REQUEST), caching.generate(**REQUEST)

    assert is_cached(second, first)
    assert second.encoded == first.encoded


@pytest.mark.parametrize("field", OTHERS)
def test_a_request_that_differs_in_any_field_is_not(caching: Client, field: str) -> None:
    first = caching.generate(**REQUEST)

    other = caching.generate(**REQUEST | {field: OTHERS[field]})

    assert not is_cached(other, first)
    assert other.encoded != first.encoded


def test_without_the_switch_nothing_is_kept(client: Client) -> None:
    first, second = client.generate(**REQUEST), client.generate(**REQUEST)

    assert not is_cached(second, first)
    assert second.encoded == first.encoded


@pytest.mark.parametrize("size", ["64", "MB", "-1MB", "64 parsec"])
def test_a_size_that_is_none_is_refused(
    repository: Path, capsys: pytest.CaptureFixture[str], size: str
) -> None:
    with pytest.raises(SystemExit):
        main(["serve", str(repository), f"--response-cache={size}"])

    assert "is not a size such as 512KB, 64MB or 1GB" in capsys.readouterr().err
