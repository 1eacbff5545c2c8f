"""The asynchronous client against a fake Triton."""

import asyncio
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import numpy as np
import pytest
from fake_triton import FakeTriton

from darkroom import (
    AsyncClient,
    DarkroomError,
    InvalidRequest,
    QueueFull,
    RequestCancelled,
    RequestTimeout,
    ServerError,
    ServerUnavailable,
)

WAIT_S = 30.0


def run(url: str, use: Callable[[AsyncClient], Awaitable[Any]], **options: Any) -> Any:
    """What `use` makes of a client that is open."""

    async def main() -> Any:
        async with AsyncClient(url, **options) as client:
            return await use(client)

    return asyncio.run(main())


def test_one_picture_is_a_list_of_one(triton: FakeTriton) -> None:
    (picture,) = run(triton.grpc_url, lambda client: client.generate("a cat", seed=7))

    assert (picture.seed, picture.getpixel((0, 0)), picture.model) == (7, (7, 20, 30), "fake")


def test_several_pictures(triton: FakeTriton) -> None:
    pictures = run(
        f"grpc://{triton.grpc_url}",
        lambda client: client.generate("a cat", seed=7, num_images_per_prompt=3),
    )

    assert [picture.seed for picture in pictures] == [7, 8, 9]
    assert triton.requests == [{"prompt": "a cat", "seed": 7, "num_images_per_prompt": 3}]


def test_requests_run_at_the_same_time(triton: FakeTriton) -> None:
    """Each waits in the server until all have come."""
    triton.gate.clear()

    async def ask_four(client: AsyncClient) -> list[int]:
        tasks = [asyncio.create_task(client.generate("a cat", seed=n)) for n in range(4)]
        await asyncio.to_thread(triton.wait_for_requests, 4, WAIT_S)
        triton.gate.set()
        return [picture.seed for (picture,) in await asyncio.gather(*tasks)]

    assert run(triton.grpc_url, ask_four) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("code", "message", "error"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, "width: 3 is out of range", InvalidRequest),
        (grpc.StatusCode.UNAVAILABLE, "the queue is full: 9 pictures are waiting", QueueFull),
        (grpc.StatusCode.UNAVAILABLE, "Server not ready", ServerUnavailable),
        (grpc.StatusCode.CANCELLED, "the request was cancelled", RequestCancelled),
        (grpc.StatusCode.CANCELLED, "timeout_ms: 50 ran out", RequestTimeout),
        (grpc.StatusCode.INTERNAL, "unet failed: out of memory", ServerError),
    ],
)
def test_an_error_of_the_server_is_raised(
    triton: FakeTriton, code: grpc.StatusCode, message: str, error: type[DarkroomError]
) -> None:
    triton.failure = (code, message)

    with pytest.raises(DarkroomError, match=message) as caught:
        run(triton.grpc_url, lambda client: client.generate("a cat"))
    assert type(caught.value) is error


def test_what_is_wrong_by_itself_is_not_sent(triton: FakeTriton) -> None:
    with pytest.raises(InvalidRequest, match="width: 'wide'"):
        run(triton.grpc_url, lambda client: client.generate("a cat", width="wide"))
    with pytest.raises(TypeError, match="'steps' is not an option"):
        run(triton.grpc_url, lambda client: client.generate("a cat", steps=4))

    assert triton.requests == []


def test_an_answer_of_another_kind_is_a_server_error(triton: FakeTriton) -> None:
    triton.answer = lambda _: {"logits": np.zeros((1, 1000), np.float32)}

    with pytest.raises(ServerError, match="the server's answer cannot be read"):
        run(triton.grpc_url, lambda client: client.generate("a cat"))


def test_a_server_that_never_answers_is_a_timeout(triton: FakeTriton) -> None:
    triton.gate.clear()

    with pytest.raises(RequestTimeout):
        run(triton.grpc_url, lambda client: client.generate("a cat", timeout=0.2))
    with pytest.raises(RequestTimeout):
        run(triton.grpc_url, lambda client: client.generate("a cat"), timeout=0.2)


def test_nobody_listening_is_server_unavailable_and_not_ready() -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        url = f"127.0.0.1:{sock.getsockname()[1]}"

        with pytest.raises(ServerUnavailable):
            run(url, lambda client: client.generate("a cat"))
        assert not run(url, lambda client: client.is_ready())


@pytest.mark.timeout(20)
def test_a_socket_that_accepts_and_says_nothing_is_not_ready() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"127.0.0.1:{silent.getsockname()[1]}"

        assert not run(url, lambda client: client.is_ready(), timeout=0.2)


@pytest.mark.parametrize("url", ["", "localhost", "http://localhost:8000", "localhost:grpc"])
def test_other_addresses_are_refused_by_name(url: str) -> None:
    with pytest.raises(InvalidRequest, match=r"^url: ") as caught:
        run(url, lambda client: client.generate("a cat"))

    assert repr(url) in str(caught.value)


def test_ready_means_that_the_model_is_loaded(triton: FakeTriton) -> None:
    async def ask_twice(client: AsyncClient) -> tuple[bool, bool]:
        before = await client.is_ready()
        triton.models.clear()
        return before, await client.is_ready()

    assert run(triton.grpc_url, ask_twice) == (True, False)


def test_cancelling_the_task_cancels_the_request_on_the_server(triton: FakeTriton) -> None:
    triton.gate.clear()

    async def leave(client: AsyncClient) -> None:
        task = asyncio.create_task(client.generate("a cat"))
        assert await asyncio.to_thread(triton.is_entered.wait, WAIT_S)
        assert not triton.is_cancelled.is_set()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(triton.is_cancelled.wait, WAIT_S)

    run(triton.grpc_url, leave)


def test_an_answered_request_is_not_cancelled_when_the_client_closes(triton: FakeTriton) -> None:
    run(triton.grpc_url, lambda client: client.generate("a cat"))

    assert not triton.is_cancelled.is_set()


def test_closing_twice_is_harmless(triton: FakeTriton) -> None:
    async def close(client: AsyncClient) -> None:
        await client.generate("a cat")
        await client.close()

    run(triton.grpc_url, close)
    assert len(triton.requests) == 1
