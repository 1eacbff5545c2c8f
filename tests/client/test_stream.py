"""Streams of the synchronous client against a fake Triton, over gRPC and HTTP."""

import contextlib
import gc
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from typing import Any

import grpc
import numpy as np
import pytest
from fake_triton import (
    Arrays,
    Failure,
    FakeTriton,
    encode_latents,
    encode_picture,
    narrate,
    paint,
    tell,
)
from PIL import Image

from darkroom import (
    Client,
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

Script = Callable[[dict[str, Any], threading.Event], Iterator[Arrays]]


@pytest.fixture(params=["grpc", "http"])
def url(request: pytest.FixtureRequest, triton: FakeTriton) -> str:
    return {"grpc": triton.grpc_url, "http": triton.http_url}[request.param]


@pytest.fixture
def client(url: str) -> Iterator[Client]:
    with Client(url, timeout=WAIT_S) as client:
        yield client


def step(number: int) -> Arrays:
    return tell(type="step", index=0, step=number, num_steps=3)


def endless(_fields: dict[str, Any], stop: threading.Event) -> Iterator[Arrays]:
    """A script whose second event never comes."""
    yield step(1)
    stop.wait(WAIT_S)


def saying(*answers: Arrays | Failure) -> Script:
    def script(_fields: dict[str, Any], _stop: threading.Event) -> Iterator[Arrays]:
        for answer in answers:
            if isinstance(answer, Failure):
                raise answer
            yield answer

    return script


def test_events_come_in_order_and_the_picture_last(client: Client) -> None:
    *events, done = client.stream("a cat", seed=7)

    assert events == [Queued(0), Step(0, 1, 3), Step(0, 2, 3), Step(0, 3, 3)]
    assert isinstance(done, Done)
    (picture,) = done.pictures
    assert (picture.seed, picture.model, picture.encoded) == (7, "fake", encode_picture(7))


def test_previews_come_as_often_as_asked(client: Client) -> None:
    events = list(client.stream("a cat", num_inference_steps=6, preview_interval=2))

    previews = [event for event in events if isinstance(event, Preview)]
    assert [preview.step for preview in previews] == [2, 4, 6]
    assert {(preview.index, preview.num_steps) for preview in previews} == {(0, 6)}
    assert previews[0].image.size == (8, 8)


def test_several_pictures_are_told_apart(client: Client) -> None:
    *events, done = client.stream("a cat", seed=7, num_images_per_prompt=2, num_inference_steps=1)

    assert events == [Queued(0), Step(0, 1, 1), Step(1, 1, 1)]
    assert isinstance(done, Done)
    assert [picture.seed for picture in done.pictures] == [7, 8]


def test_options_and_id_reach_the_server(triton: FakeTriton) -> None:
    for url in (triton.grpc_url, triton.http_url):
        with Client(url) as client:
            stream = client.stream(
                "ein Bär ☃",
                num_images_per_prompt=1,
                preview_interval=0,
                request_id="an id/ü",
                guidance_scale=5,
                seed=2**62,
                eta=0.5,
                timestep_spacing="trailing",
            )
            assert stream.request_id == "an id/ü"
            list(stream)

    over_grpc, over_http = triton.requests
    assert over_grpc == {
        "prompt": "ein Bär ☃",
        "num_images_per_prompt": 1,
        "preview_interval": 0,
        "guidance_scale": 5.0,
        "seed": 2**62,
        "eta": 0.5,
        "timestep_spacing": "trailing",
    }
    assert over_http == {**over_grpc, "output_format": "b64_png"}
    assert triton.request_ids == ["an id/ü", "an id/ü"]


def test_each_stream_has_an_id_and_a_seed_of_its_own(client: Client, triton: FakeTriton) -> None:
    streams = [client.stream("a cat") for _ in range(3)]
    for stream in streams:
        list(stream)

    assert {stream.request_id for stream in streams} == set(triton.request_ids)
    assert len(set(triton.request_ids)) == 3
    assert len({fields["seed"] for fields in triton.requests}) == 3


def test_an_event_is_told_when_it_happens(client: Client, triton: FakeTriton) -> None:
    go_on = threading.Event()

    def script(fields: dict[str, Any], _stop: threading.Event) -> Iterator[Arrays]:
        yield step(1)
        assert go_on.wait(WAIT_S)
        yield {**tell(type="done"), **paint(fields)}

    triton.script = script
    stream = client.stream("a cat", seed=1)

    assert next(stream) == Step(0, 1, 3)
    go_on.set()
    assert isinstance(next(stream), Done)


def test_the_request_is_sent_before_anyone_reads(client: Client, triton: FakeTriton) -> None:
    stream = client.stream("a cat")

    triton.wait_for_requests(1, WAIT_S)
    stream.close()


def test_many_streams_of_one_client_run_at_the_same_time(
    client: Client, triton: FakeTriton
) -> None:
    """Each waits in the server until all have come."""
    triton.gate.clear()
    streams = [client.stream("a cat", seed=seed) for seed in range(12)]
    triton.wait_for_requests(12, WAIT_S)
    triton.gate.set()

    # Read in turn, a step of each.
    for events in zip(*streams, strict=True):
        assert len({type(event) for event in events}) == 1
    assert [event.pictures[0].seed for event in events if isinstance(event, Done)] == [*range(12)]


def test_threads_share_a_client(client: Client) -> None:
    def last_seed(seed: int) -> int:
        *_, done = client.stream("a cat", seed=seed)
        assert isinstance(done, Done)
        return done.pictures[0].seed

    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(last_seed, range(24))) == [*range(24)]


def test_a_stream_runs_beside_plain_requests(client: Client, triton: FakeTriton) -> None:
    triton.script = endless
    with client.stream("a cat") as stream:
        next(stream)
        assert client.generate("a cat", seed=3).seed == 3


def close(client: Client) -> None:
    stream = client.stream("a cat")
    next(stream)
    stream.close()


def leave_the_block(client: Client) -> None:
    with client.stream("a cat") as stream:
        for _ in stream:
            break


def fail_in_the_block(client: Client) -> None:
    with contextlib.suppress(ZeroDivisionError), client.stream("a cat") as stream:
        next(stream)
        raise ZeroDivisionError


def break_the_loop(client: Client) -> None:
    for _ in client.stream("a cat"):
        break
    gc.collect()


def forget(client: Client) -> None:
    next(client.stream("a cat"))
    gc.collect()


@pytest.mark.parametrize(
    "leave", [close, leave_the_block, fail_in_the_block, break_the_loop, forget]
)
def test_leaving_early_cancels_the_request(
    client: Client, triton: FakeTriton, leave: Callable[[Client], None]
) -> None:
    triton.script = endless
    leave(client)

    assert triton.is_cancelled.wait(WAIT_S)


def test_a_stream_that_nobody_reads_is_cancelled_too(client: Client, triton: FakeTriton) -> None:
    triton.gate.clear()
    stream = client.stream("a cat")
    assert triton.is_entered.wait(WAIT_S)
    del stream
    gc.collect()

    assert triton.is_cancelled.wait(WAIT_S)


@pytest.mark.parametrize("leave", [leave_the_block, break_the_loop])
def test_the_next_stream_is_served_after_one_was_left(
    client: Client, triton: FakeTriton, leave: Callable[[Client], None]
) -> None:
    triton.script = endless
    leave(client)
    triton.script = narrate

    assert len(list(client.stream("a cat"))) == 5


def test_a_stream_read_to_its_end_is_not_cancelled(client: Client, triton: FakeTriton) -> None:
    """Even though the server takes some time to end what is answered."""

    def script(fields: dict[str, Any], stop: threading.Event) -> Iterator[Arrays]:
        yield {**tell(type="done"), **paint(fields)}
        stop.wait(SHORT_S)

    triton.script = script
    for event in client.stream("a cat"):
        assert isinstance(event, Done)
        break
    client.close()

    assert not triton.is_cancelled.wait(SHORT_S)


def test_a_grpc_stream_that_ended_in_an_error_is_not_cancelled(triton: FakeTriton) -> None:
    """Triton never frees what is left before it has ended it itself."""
    triton.linger_s = SHORT_S
    triton.script = saying(step(1), Failure(grpc.StatusCode.INTERNAL, "unet failed"))

    with Client(triton.grpc_url) as client, pytest.raises(ServerError, match="unet failed"):
        list(client.stream("a cat"))
    assert not triton.is_cancelled.wait(SHORT_S)


def test_an_error_after_the_pictures_is_none(client: Client, triton: FakeTriton) -> None:
    failure = Failure(grpc.StatusCode.INTERNAL, "cannot clean up")
    triton.script = saying({**tell(type="done"), **paint({"seed": 1})}, failure)

    assert [type(event) for event in client.stream("a cat")] == [Done]


def test_a_stream_that_is_over_stays_over(client: Client) -> None:
    stream = client.stream("a cat")
    list(stream)

    assert list(stream) == []
    stream.close()
    stream.close()
    with stream:
        assert list(stream) == []


def test_a_closed_stream_has_no_more_events(client: Client, triton: FakeTriton) -> None:
    triton.script = endless
    stream = client.stream("a cat")
    next(stream)
    stream.close()
    stream.close()

    assert list(stream) == []


@pytest.mark.parametrize("num_read", [0, 1])
def test_closing_in_another_thread_wakes_the_reader(
    client: Client, triton: FakeTriton, num_read: int
) -> None:
    triton.script = endless
    if not num_read:
        triton.gate.clear()
    stream = client.stream("a cat")
    for _ in range(num_read):
        next(stream)
    assert triton.is_entered.wait(WAIT_S)
    closing = threading.Timer(SHORT_S, stream.close)
    closing.start()

    with pytest.raises(RequestCancelled, match="closed before the pictures came"):
        next(stream)
    closing.join()
    assert triton.is_cancelled.wait(WAIT_S)
    assert list(stream) == []


def test_closing_the_client_ends_its_streams(client: Client, triton: FakeTriton) -> None:
    triton.script = endless
    stream = client.stream("a cat")
    next(stream)
    client.close()

    with pytest.raises(RequestCancelled):
        next(stream)
    assert triton.is_cancelled.wait(WAIT_S)


def test_ctrl_c_cancels_the_request(client: Client, triton: FakeTriton) -> None:
    triton.script = endless
    stream = client.stream("a cat")
    next(stream)
    interrupt = threading.Timer(SHORT_S, os.kill, (os.getpid(), signal.SIGINT))
    interrupt.start()

    with pytest.raises(KeyboardInterrupt):
        next(stream)
    assert triton.is_cancelled.wait(WAIT_S)
    interrupt.join()


def test_the_timeout_is_that_of_the_whole_stream(client: Client, triton: FakeTriton) -> None:
    """Events that go on coming do not put it off."""

    def script(_fields: dict[str, Any], stop: threading.Event) -> Iterator[Arrays]:
        number = 0
        while not stop.wait(0.01):
            number += 1
            yield step(number)

    triton.script = script
    seen: list[Event] = []

    with pytest.raises(RequestTimeout):
        seen.extend(client.stream("a cat", timeout=SHORT_S))
    assert triton.is_cancelled.wait(WAIT_S)


@pytest.mark.parametrize("num_read", [0, 1])
def test_a_server_that_falls_silent_is_a_timeout(
    client: Client, triton: FakeTriton, num_read: int
) -> None:
    triton.script = endless
    if not num_read:
        triton.gate.clear()
    stream = client.stream("a cat", timeout=SHORT_S)

    with pytest.raises(RequestTimeout):
        list(stream)
    assert list(stream) == []
    assert triton.is_cancelled.wait(WAIT_S)


def test_the_clients_own_timeout_counts_where_a_stream_names_none(
    triton: FakeTriton, url: str
) -> None:
    triton.script = endless
    with Client(url, timeout=SHORT_S) as client, pytest.raises(RequestTimeout):
        list(client.stream("a cat"))


FAILURES = [
    (grpc.StatusCode.INVALID_ARGUMENT, "width: 3 is out of range", InvalidRequest),
    (grpc.StatusCode.UNAVAILABLE, "the queue is full; retry_after_ms: 850", QueueFull),
    (grpc.StatusCode.UNAVAILABLE, "timeout_ms: 5 cannot be kept; retry_after_ms: 9", QueueFull),
    (grpc.StatusCode.UNAVAILABLE, "the server is stopping", ServerUnavailable),
    (grpc.StatusCode.CANCELLED, "the request was cancelled", RequestCancelled),
    (grpc.StatusCode.CANCELLED, "timeout_ms: 50 ran out", RequestTimeout),
    (grpc.StatusCode.INTERNAL, "unet failed: out of memory", ServerError),
]


@pytest.mark.parametrize(("code", "message", "error"), FAILURES)
@pytest.mark.parametrize("ends_with_status", [True, False])
@pytest.mark.parametrize("num_steps", [0, 2])
def test_an_error_of_the_server_is_raised_and_the_next_request_is_served(
    client: Client,
    triton: FakeTriton,
    *,
    code: grpc.StatusCode,
    message: str,
    error: type[DarkroomError],
    ends_with_status: bool,
    num_steps: int,
) -> None:
    """Whether it comes first or in between, and without its status or with it."""
    triton.ends_with_status = ends_with_status
    triton.script = saying(*(step(n) for n in range(num_steps)), Failure(code, message))
    stream = client.stream("a cat")

    for number in range(num_steps):
        assert next(stream) == Step(0, number, 3)
    with pytest.raises(DarkroomError) as caught:
        next(stream)
    assert type(caught.value) is error
    assert str(caught.value) == message
    assert list(stream) == []
    triton.script = narrate
    assert len(list(client.stream("a cat"))) == 5


def test_a_full_queue_tells_when_to_come_back(client: Client, triton: FakeTriton) -> None:
    triton.failure = (grpc.StatusCode.UNAVAILABLE, "the queue is full; retry_after_ms: 850")

    for ask in (client.stream, client.generate):
        with pytest.raises(QueueFull) as caught:
            list(ask("a cat"))
        assert caught.value.retry_after_s == 0.85


MALFORMED = [
    tell(),
    tell(type=3),
    tell(type="queued"),
    tell(type="step", index=0, step="one", num_steps=3),
    tell(type="preview", index=0, step=1, num_steps=3),
    tell(type="done"),
    {"event": np.array([b"no JSON"], np.object_)},
    {"event": np.array([1.5], np.float32)},
    {"logits": np.zeros(3, np.float32)},
]


@pytest.mark.parametrize("answer", MALFORMED, ids=str)
def test_a_malformed_event_is_a_server_error_and_ends_the_request(
    client: Client, triton: FakeTriton, answer: Arrays
) -> None:
    def script(_fields: dict[str, Any], stop: threading.Event) -> Iterator[Arrays]:
        yield step(1)
        yield answer
        stop.wait(WAIT_S)

    triton.script = script
    stream = client.stream("a cat")

    assert next(stream) == Step(0, 1, 3)
    with pytest.raises(ServerError, match="the server's answer cannot be read"):
        next(stream)
    assert triton.is_cancelled.wait(WAIT_S)
    assert list(stream) == []


@pytest.mark.parametrize("num_steps", [0, 2])
def test_a_stream_that_ends_without_pictures_is_a_server_error(
    client: Client, triton: FakeTriton, num_steps: int
) -> None:
    triton.script = saying(*(step(n) for n in range(num_steps)))

    with pytest.raises(ServerError, match="the stream ended before the pictures came"):
        list(client.stream("a cat"))


def test_events_that_a_newer_server_adds_are_passed_over(
    client: Client, triton: FakeTriton
) -> None:
    done = {**tell(type="done"), **paint({"seed": 1})}
    triton.script = saying(tell(type="weather", rain=True), step(1), done)

    assert [type(event) for event in client.stream("a cat")] == [Step, Done]


def test_what_is_wrong_by_itself_is_not_sent(client: Client, triton: FakeTriton) -> None:
    with pytest.raises(InvalidRequest, match="width: 'wide' is not a whole int32"):
        client.stream("a cat", width="wide")  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match=r"preview_interval: 0\.5 is not a whole int32"):
        client.stream("a cat", preview_interval=0.5)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match="request_id: '' is not a text of one"):
        client.stream("a cat", request_id="")
    with pytest.raises(TypeError, match="'steps' is not an option"):
        client.stream("a cat", steps=4)  # type: ignore[call-arg]
    with pytest.raises(InvalidRequest, match="output_format: 'latent' is no picture"):
        client.stream("a cat", output_format="latent")
    with pytest.raises(InvalidRequest, match="control_image: 0 given"):
        client.stream("a cat", controlnet="canny")

    assert triton.requests == []


def test_streams_carry_pictures_and_adapters(client: Client, triton: FakeTriton) -> None:
    picture = encode_picture(7)
    done = list(
        client.stream(
            "a cat",
            seed=1,
            image=picture,
            original_size=(512, 768),
            controlnet="canny",
            control_image=picture,
            lora={"ink": 0.75, "wash": 1},
        )
    )[-1]

    assert isinstance(done, Done)
    fields = {name: value for name, value in triton.requests[0].items() if name != "output_format"}
    assert fields == {
        "prompt": "a cat",
        "seed": 1,
        "image": picture,
        "original_size": [512, 768],
        "controlnet": ["canny"],
        "control_image": [picture],
        "lora": ["ink", "wash"],
        "lora_scale": [0.75, 1.0],
    }


def test_streams_go_on_from_latents(client: Client, triton: FakeTriton) -> None:
    latents = client.generate_latents("a cat", seed=7, denoising_end=0.75)
    assert len(list(client.stream("a cat", image=latents, denoising_start=0.75))) == 5

    assert triton.requests[1]["image"] == encode_latents(7)


def test_http_carries_no_other_format_than_png(triton: FakeTriton) -> None:
    with Client(triton.http_url) as client:
        with pytest.raises(InvalidRequest, match="output_format: 'webp' is not for HTTP streams"):
            client.stream("a cat", output_format="webp")
        assert len(list(client.stream("a cat", output_format="png"))) == 5


def test_a_server_without_streams_is_server_unavailable(client: Client, triton: FakeTriton) -> None:
    triton.models.discard("stable_diffusion_stream")

    with pytest.raises(ServerUnavailable, match="unknown model: 'stable_diffusion_stream'"):
        list(client.stream("a cat"))


def test_another_models_streams_are_asked_if_named(triton: FakeTriton, url: str) -> None:
    triton.models = {"sdxl_stream", "sdxl_cancel"}
    with Client(url, model="sdxl") as client:
        assert len(list(client.stream("a cat"))) == 5
        assert not client.cancel("nobody")


@pytest.mark.parametrize("scheme", ["", "http://"])
def test_nobody_listening_is_server_unavailable(scheme: str) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        with (
            Client(f"{scheme}127.0.0.1:{sock.getsockname()[1]}") as client,
            pytest.raises(ServerUnavailable, match="refused"),
        ):
            list(client.stream("a cat", timeout=WAIT_S))


@pytest.mark.parametrize("scheme", ["", "http://"])
def test_a_socket_that_accepts_and_says_nothing_is_a_timeout(scheme: str) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        Client(f"{scheme}127.0.0.1:{silent.getsockname()[1]}") as client,
        pytest.raises(RequestTimeout),
    ):
        list(client.stream("a cat", timeout=SHORT_S))


def http_answer(body: bytes, status: str = "200 OK", kind: str = "text/event-stream") -> bytes:
    head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


EVENT = b'data: {"event": "{\\"type\\": \\"queued\\", \\"position\\": 0}"}\n\n'


@pytest.mark.parametrize(
    ("raw", "error"),
    [
        pytest.param(b"", ServerUnavailable, id="hangs up"),
        pytest.param(b"SSH-2.0-OpenSSH\r\n", ServerUnavailable, id="not HTTP"),
        pytest.param(http_answer(EVENT), ServerError, id="nothing but one event"),
        pytest.param(http_answer(EVENT[:-2]), ServerError, id="an event is cut"),
        pytest.param(http_answer(b": hello\n\nid: 3\n\n"), ServerError, id="no event"),
        pytest.param(http_answer(b"hello", kind="text/html"), ServerError, id="another page"),
        pytest.param(http_answer(b"data: hello\n\n"), ServerError, id="not JSON"),
        pytest.param(
            http_answer(b"hello", "500 Oops", "text/plain"), ServerError, id="500 without JSON"
        ),
        pytest.param(
            http_answer(b"", "503 Busy", "text/plain"), ServerUnavailable, id="503 without a body"
        ),
        pytest.param(
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n" + EVENT,
            ServerUnavailable,
            id="malformed chunks",
        ),
        pytest.param(
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nff\r\n" + EVENT,
            ServerUnavailable,
            id="hangs up in a chunk",
        ),
        pytest.param(
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n"
            % (len(EVENT), EVENT),
            ServerUnavailable,
            id="hangs up between chunks",
        ),
    ],
)
def test_nonsense_over_http_is_an_error_of_ours(
    triton: FakeTriton, raw: bytes, error: type[DarkroomError]
) -> None:
    triton.raw_http = raw
    with Client(triton.http_url) as client, pytest.raises(DarkroomError) as caught:
        list(client.stream("a cat", timeout=WAIT_S))

    assert type(caught.value) is error


def test_an_event_of_several_lines_is_one_event(triton: FakeTriton) -> None:
    """Triton writes none, but it is what server-sent events allow."""
    triton.raw_http = http_answer(EVENT.replace(b'{"event', b'{\r\ndata: "event'))
    with Client(triton.http_url) as client:
        assert next(client.stream("a cat")) == Queued(0)


def test_a_server_behind_a_path_is_asked(triton: FakeTriton) -> None:
    with Client(f"{triton.http_url}/behind/a/proxy/") as client:
        assert len(list(client.stream("a cat"))) == 5


def test_pictures_of_many_megabytes_arrive(client: Client, triton: FakeTriton) -> None:
    """More than gRPC takes if it is not told to."""
    noise = np.random.default_rng(0).integers(0, 256, (1400, 1400, 3), np.uint8)
    buffer = BytesIO()
    Image.fromarray(noise).save(buffer, "PNG", compress_level=0)
    assert len(buffer.getvalue()) > 5_000_000
    triton.answer = lambda fields: {
        **paint(fields),
        "image": np.array([buffer.getvalue()], np.object_),
    }
    triton.script = lambda fields, _: iter([{**tell(type="done"), **triton.answer(fields)}])

    (done,) = client.stream("a cat")
    assert isinstance(done, Done)
    assert done.pictures[0].encoded == buffer.getvalue()
    assert client.generate("a cat").encoded == buffer.getvalue()


def test_a_stream_is_cancelled_by_its_id(client: Client, triton: FakeTriton) -> None:
    triton.script = endless
    stream = client.stream("a cat", request_id="mine")
    next(stream)

    assert client.cancel("mine")
    with pytest.raises(RequestCancelled, match="the request was cancelled"):
        next(stream)
    assert triton.cancelled_ids == ["mine"]


def test_a_plain_request_is_cancelled_by_its_id(client: Client, triton: FakeTriton) -> None:
    triton.gate.clear()
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(client.generate, "a cat", request_id="mine")
        triton.wait_for_requests(1, WAIT_S)
        assert client.cancel("mine")
        with pytest.raises(RequestCancelled, match="the request was cancelled"):
            asked.result()


def test_what_is_not_in_flight_cannot_be_cancelled(client: Client) -> None:
    client.generate("a cat", request_id="mine")

    assert client.cancel("mine") is False
    assert client.cancel("nobody's") is False


def test_an_id_of_several_requests_cancels_none(client: Client, triton: FakeTriton) -> None:
    triton.script = endless
    streams = [client.stream("a cat", request_id="ours") for _ in range(2)]
    for stream in streams:
        next(stream)

    with pytest.raises(InvalidRequest, match="request_id: 'ours' is carried by 2 requests"):
        client.cancel("ours")
    for stream in streams:
        stream.close()


@pytest.mark.parametrize("request_id", ["", None, 7])
def test_an_id_that_is_no_text_cannot_be_cancelled(
    client: Client, triton: FakeTriton, request_id: Any
) -> None:
    with pytest.raises(InvalidRequest, match="request_id: "):
        client.cancel(request_id)
    assert triton.cancelled_ids == []


def test_a_server_that_cannot_cancel_is_server_unavailable(
    client: Client, triton: FakeTriton
) -> None:
    triton.models.discard("stable_diffusion_cancel")

    with pytest.raises(ServerUnavailable, match="unknown model: 'stable_diffusion_cancel'"):
        client.cancel("mine")
