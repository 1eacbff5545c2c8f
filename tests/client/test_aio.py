"""The asynchronous client against a fake Triton."""

import asyncio
import contextlib
import gc
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from fake_triton import Arrays, Failure, FakeTriton, encode_latents, narrate, paint, tell

from darkroom import (
    AsyncClient,
    AsyncEventStream,
    DarkroomError,
    Done,
    Event,
    InvalidRequest,
    Preview,
    Queued,
    QueueFull,
    RequestCancelled,
    RequestTimeout,
    ServerError,
    ServerUnavailable,
    Step,
)

SHORT_S = 0.2
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


def test_another_call_goes_on_from_latents(triton: FakeTriton) -> None:
    async def ask(client: AsyncClient) -> None:
        begun = await client.generate_latents(
            "a cat", seed=7, num_images_per_prompt=2, denoising_end=0.75
        )
        await client.generate("a cat", seed=8, image=begun[1], denoising_start=0.75)
        (alone,) = await client.generate_latents("a cat", seed=7)
        assert alone.to_bytes() == begun[0].to_bytes()

    run(triton.grpc_url, ask)
    first, second, _ = triton.requests
    assert (first["output_format"], first["denoising_end"]) == ("latent", 0.75)
    assert (second["image"], second["denoising_start"]) == (encode_latents(8), 0.75)


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
    with pytest.raises(InvalidRequest, match=r"^image: no-such\.png: No such file"):
        run(triton.grpc_url, lambda client: client.generate("a cat", image="no-such.png"))
    with pytest.raises(InvalidRequest, match="output_format: 'png' is for pictures"):
        run(triton.grpc_url, lambda client: client.generate_latents("", output_format="png"))

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

    assert not triton.is_cancelled.wait(SHORT_S)


def test_closing_twice_is_harmless(triton: FakeTriton) -> None:
    async def close(client: AsyncClient) -> None:
        await client.generate("a cat")
        await client.close()

    run(triton.grpc_url, close)
    assert len(triton.requests) == 1


def test_a_request_carries_its_id_and_is_cancelled_by_it(triton: FakeTriton) -> None:
    triton.gate.clear()

    async def cancel(client: AsyncClient) -> tuple[bool, bool]:
        task = asyncio.create_task(client.generate("a cat", request_id="mine"))
        await asyncio.to_thread(triton.wait_for_requests, 1, WAIT_S)
        cancelled = await client.cancel("mine")
        with pytest.raises(RequestCancelled, match="the request was cancelled"):
            await task
        return cancelled, await client.cancel("mine")

    assert run(triton.grpc_url, cancel) == (True, False)
    assert triton.request_ids == ["mine"]


def test_an_id_of_several_requests_cancels_none(triton: FakeTriton) -> None:
    triton.script = endless

    async def cancel(client: AsyncClient) -> None:
        async with (
            client.stream("a cat", request_id="ours") as one,
            client.stream("a cat", request_id="ours") as other,
        ):
            await anext(one)
            await anext(other)
            with pytest.raises(InvalidRequest, match="request_id: 'ours' is carried by 2"):
                await client.cancel("ours")

    run(triton.grpc_url, cancel)


def step(number: int) -> Arrays:
    return tell(type="step", index=0, step=number, num_steps=3)


def endless(_fields: dict[str, Any], stop: threading.Event) -> Iterator[Arrays]:
    """A script whose second event never comes."""
    yield step(1)
    stop.wait(WAIT_S)


async def read(stream: AsyncIterator[Event]) -> list[Event]:
    return [event async for event in stream]


def test_a_stream_tells_events_in_order_and_the_pictures_last(triton: FakeTriton) -> None:
    async def ask(client: AsyncClient) -> list[Event]:
        stream = client.stream(
            "a cat",
            seed=7,
            num_images_per_prompt=2,
            num_inference_steps=2,
            preview_interval=2,
            request_id="mine",
        )
        assert stream.request_id == "mine"
        return await read(stream)

    *events, done = run(triton.grpc_url, ask)

    previews = [event for event in events if isinstance(event, Preview)]
    steps = [event for event in events if not isinstance(event, Preview)]
    assert steps == [Queued(0), Step(0, 1, 2), Step(1, 1, 2), Step(0, 2, 2), Step(1, 2, 2)]
    assert [(it.index, it.step, it.image.size) for it in previews] == [
        (0, 2, (8, 8)),
        (1, 2, (8, 8)),
    ]
    assert [picture.seed for picture in done.pictures] == [7, 8]
    assert triton.request_ids == ["mine"]


def test_an_event_is_told_when_it_happens(triton: FakeTriton) -> None:
    go_on = threading.Event()

    def script(fields: dict[str, Any], _stop: threading.Event) -> Iterator[Arrays]:
        yield step(1)
        assert go_on.wait(WAIT_S)
        yield {**tell(type="done"), **paint(fields)}

    triton.script = script

    async def ask(client: AsyncClient) -> None:
        stream = client.stream("a cat", seed=1)
        assert await anext(stream) == Step(0, 1, 3)
        go_on.set()
        assert isinstance(await anext(stream), Done)

    run(triton.grpc_url, ask)


def test_many_streams_run_at_the_same_time(triton: FakeTriton) -> None:
    """Each waits in the server until all have come."""
    triton.gate.clear()

    async def ask(client: AsyncClient) -> list[list[Event]]:
        tasks = [asyncio.create_task(read(client.stream("a cat", seed=seed))) for seed in range(12)]
        await asyncio.to_thread(triton.wait_for_requests, 12, WAIT_S)
        triton.gate.set()
        return await asyncio.gather(*tasks)

    answers = run(triton.grpc_url, ask)

    assert [events[-1].pictures[0].seed for events in answers] == [*range(12)]
    assert {len(events) for events in answers} == {5}


async def close(client: AsyncClient) -> None:
    stream = client.stream("a cat")
    await anext(stream)
    await stream.aclose()
    await stream.aclose()
    assert await read(stream) == []


async def leave_the_block(client: AsyncClient) -> None:
    async with client.stream("a cat") as stream:
        async for _ in stream:
            break


async def fail_in_the_block(client: AsyncClient) -> None:
    with contextlib.suppress(ZeroDivisionError):
        async with client.stream("a cat") as stream:
            await anext(stream)
            raise ZeroDivisionError


async def break_the_loop(client: AsyncClient) -> None:
    async for _ in client.stream("a cat"):
        break


async def cancel_the_task(client: AsyncClient) -> None:
    seen = asyncio.Event()

    async def watch() -> None:
        async for _ in client.stream("a cat"):
            seen.set()

    task = asyncio.create_task(watch())
    await seen.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def run_out_of_time(client: AsyncClient) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(SHORT_S):
            await read(client.stream("a cat"))


@pytest.mark.parametrize(
    "leave",
    [
        close,
        leave_the_block,
        fail_in_the_block,
        break_the_loop,
        cancel_the_task,
        run_out_of_time,
    ],
)
def test_leaving_a_stream_early_cancels_the_request(
    triton: FakeTriton, leave: Callable[[AsyncClient], Awaitable[None]]
) -> None:
    triton.script = endless

    async def leave_and_ask(client: AsyncClient) -> None:
        await leave(client)
        gc.collect()
        assert await asyncio.to_thread(triton.is_cancelled.wait, WAIT_S)
        triton.script = narrate
        assert len(await read(client.stream("a cat"))) == 5

    run(triton.grpc_url, leave_and_ask)


def test_a_stream_that_outlives_its_loop_is_harmless(triton: FakeTriton) -> None:
    triton.script = endless
    left = []

    async def leave() -> None:
        client = AsyncClient(triton.grpc_url)
        left.append(client.stream("a cat"))
        await anext(left[0])

    asyncio.run(leave())
    left.clear()
    gc.collect()

    assert triton.is_cancelled.wait(WAIT_S)


def test_a_stream_that_ended_in_an_error_is_not_cancelled(triton: FakeTriton) -> None:
    """Triton never frees what is left before it has ended it itself."""
    triton.linger_s = SHORT_S
    triton.failure = (grpc.StatusCode.INTERNAL, "unet failed")

    async def ask(client: AsyncClient) -> None:
        with pytest.raises(ServerError, match="unet failed"):
            await read(client.stream("a cat"))

    run(triton.grpc_url, ask)
    assert not triton.is_cancelled.wait(SHORT_S)


def test_a_stream_read_to_its_end_is_not_cancelled(triton: FakeTriton) -> None:
    """Even though the server takes some time to end what is answered."""

    def script(fields: dict[str, Any], stop: threading.Event) -> Iterator[Arrays]:
        yield {**tell(type="done"), **paint(fields)}
        stop.wait(SHORT_S)

    triton.script = script

    async def ask(client: AsyncClient) -> None:
        async with client.stream("a cat") as stream:
            async for event in stream:
                assert isinstance(event, Done)
                break
        assert await read(stream) == []

    run(triton.grpc_url, ask)
    assert not triton.is_cancelled.wait(SHORT_S)


def test_an_error_after_the_pictures_is_none(triton: FakeTriton) -> None:
    def script(fields: dict[str, Any], _stop: threading.Event) -> Iterator[Arrays]:
        yield {**tell(type="done"), **paint(fields)}
        raise Failure(grpc.StatusCode.INTERNAL, "cannot clean up")

    triton.script = script

    (done,) = run(triton.grpc_url, lambda client: read(client.stream("a cat")))
    assert isinstance(done, Done)


def test_closing_in_another_task_wakes_the_reader(triton: FakeTriton) -> None:
    triton.script = endless

    async def ask(client: AsyncClient) -> None:
        for closing in (AsyncEventStream.aclose, lambda _: client.close()):
            stream = client.stream("a cat")
            await anext(stream)
            task = asyncio.create_task(read(stream))
            await asyncio.sleep(SHORT_S)
            await closing(stream)
            with pytest.raises(RequestCancelled, match="closed before the pictures came"):
                await task
            assert await read(stream) == []
        assert await asyncio.to_thread(triton.is_cancelled.wait, WAIT_S)

    run(triton.grpc_url, ask)


def test_closing_the_client_is_no_cancelled_task(triton: FakeTriton) -> None:
    triton.gate.clear()

    async def ask(client: AsyncClient) -> None:
        task = asyncio.create_task(client.generate("a cat"))
        await asyncio.to_thread(triton.wait_for_requests, 1, WAIT_S)
        await client.close()
        with pytest.raises(RequestCancelled, match="closed before the pictures came"):
            await task

    run(triton.grpc_url, ask)


def test_the_timeout_is_that_of_the_whole_stream(triton: FakeTriton) -> None:
    """Events that go on coming do not put it off."""

    def script(_fields: dict[str, Any], stop: threading.Event) -> Iterator[Arrays]:
        number = 0
        while not stop.wait(0.01):
            number += 1
            yield step(number)

    triton.script = script

    with pytest.raises(RequestTimeout):
        run(triton.grpc_url, lambda client: read(client.stream("a cat", timeout=SHORT_S)))
    with pytest.raises(RequestTimeout):
        run(triton.grpc_url, lambda client: read(client.stream("a cat")), timeout=SHORT_S)
    assert triton.is_cancelled.wait(WAIT_S)


@pytest.mark.parametrize("num_steps", [0, 2])
@pytest.mark.parametrize("ends_with_status", [True, False])
def test_an_error_in_a_stream_is_raised(
    triton: FakeTriton, *, num_steps: int, ends_with_status: bool
) -> None:
    def script(_fields: dict[str, Any], _stop: threading.Event) -> Iterator[Arrays]:
        yield from map(step, range(num_steps))
        raise Failure(grpc.StatusCode.UNAVAILABLE, "the queue is full; retry_after_ms: 850")

    triton.ends_with_status = ends_with_status
    triton.script = script

    async def ask(client: AsyncClient) -> None:
        stream = client.stream("a cat")
        assert [await anext(stream) for _ in range(num_steps)] == [
            Step(0, number, 3) for number in range(num_steps)
        ]
        with pytest.raises(QueueFull) as caught:
            await anext(stream)
        assert caught.value.retry_after_s == 0.85
        assert await read(stream) == []

    run(triton.grpc_url, ask)


def test_a_malformed_event_is_a_server_error_and_ends_the_request(triton: FakeTriton) -> None:
    def script(_fields: dict[str, Any], stop: threading.Event) -> Iterator[Arrays]:
        yield tell(type="weather")
        yield tell(type="step")
        stop.wait(WAIT_S)

    triton.script = script

    with pytest.raises(ServerError, match="the server's answer cannot be read"):
        run(triton.grpc_url, lambda client: read(client.stream("a cat")))
    assert triton.is_cancelled.wait(WAIT_S)


def test_a_stream_that_ends_without_pictures_is_a_server_error(triton: FakeTriton) -> None:
    triton.script = lambda *_: iter([step(1)])

    with pytest.raises(ServerError, match="the stream ended before the pictures came"):
        run(triton.grpc_url, lambda client: read(client.stream("a cat")))


def test_a_server_without_streams_is_server_unavailable(triton: FakeTriton) -> None:
    triton.models.discard("stable_diffusion_stream")

    with pytest.raises(ServerUnavailable, match="unknown model: 'stable_diffusion_stream'"):
        run(triton.grpc_url, lambda client: read(client.stream("a cat")))


def test_a_stream_to_nobody_is_server_unavailable() -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        url = f"127.0.0.1:{sock.getsockname()[1]}"

        with pytest.raises(ServerUnavailable):
            run(url, lambda client: read(client.stream("a cat")))


def test_what_is_wrong_by_itself_is_not_streamed(triton: FakeTriton) -> None:
    async def ask(client: AsyncClient) -> None:
        with pytest.raises(InvalidRequest, match=r"preview_interval: 0\.5"):
            client.stream("a cat", preview_interval=0.5)
        with pytest.raises(InvalidRequest, match="request_id: ''"):
            client.stream("a cat", request_id="")
        with pytest.raises(InvalidRequest, match="request_id: None"):
            await client.cancel(None)
        with pytest.raises(TypeError, match="'steps' is not an option"):
            client.stream("a cat", steps=4)

    run(triton.grpc_url, ask)
    assert triton.requests == []
