"""Addresses, absent servers, silent servers and servers that talk nonsense, over gRPC and HTTP."""

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator

import grpc
import pytest
from fake_triton import FakeTriton

from darkroom import (
    Client,
    DarkroomError,
    InvalidRequest,
    RequestTimeout,
    ServerError,
    ServerUnavailable,
)
from darkroom.transport import GrpcTransport, HttpTransport, Transport, open_transport

SHORT_S = 0.2
LONG_S = 30.0


@pytest.fixture(params=["grpc", "http"])
def url(request: pytest.FixtureRequest, triton: FakeTriton) -> str:
    return {"grpc": triton.grpc_url, "http": triton.http_url}[request.param]


@pytest.fixture
def unused_port() -> Iterator[int]:
    """A port that is bound, so that nobody else takes it, and on which nobody listens."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield sock.getsockname()[1]


@pytest.mark.parametrize(
    ("url", "kind"),
    [
        ("localhost:8001", GrpcTransport),
        ("grpc://localhost:8001", GrpcTransport),
        ("[::1]:8001", GrpcTransport),
        ("http://localhost:8000", HttpTransport),
        ("http://localhost:8000/behind/a/proxy", HttpTransport),
    ],
)
def test_the_scheme_chooses_the_transport(url: str, kind: type[Transport]) -> None:
    transport = open_transport(url)
    transport.close()

    assert isinstance(transport, kind)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "localhost",
        "localhost:",
        "localhost:grpc",
        "localhost:99999",
        ":8001",
        "grpc://localhost",
        "http://localhost",
        "http://localhost:",
        "http://localhost:web",
        "http://localhost:99999",
        "https://localhost:8000",
        "ftp://localhost:21",
        "8001",
    ],
)
def test_other_addresses_are_refused_by_name(url: str) -> None:
    with pytest.raises(InvalidRequest, match=r"^url: ") as caught:
        Client(url)

    assert repr(url) in str(caught.value)
    assert "grpc://host:port or http://host:port" in str(caught.value)


@pytest.mark.parametrize("scheme", ["", "grpc://", "http://"])
def test_nobody_listening_is_server_unavailable(scheme: str, unused_port: int) -> None:
    with (
        Client(f"{scheme}127.0.0.1:{unused_port}") as client,
        pytest.raises(ServerUnavailable, match="refused"),
    ):
        client.generate("a cat", timeout=LONG_S)


@pytest.mark.parametrize("scheme", ["", "http://"])
def test_nobody_listening_is_not_ready(scheme: str, unused_port: int) -> None:
    with Client(f"{scheme}127.0.0.1:{unused_port}") as client:
        assert not client.is_ready()


def test_a_server_that_never_answers_is_a_timeout(triton: FakeTriton, url: str) -> None:
    triton.gate.clear()
    with Client(url) as client, pytest.raises(RequestTimeout):
        client.generate("a cat", timeout=SHORT_S)

    assert triton.is_entered.is_set()


def test_the_clients_own_timeout_counts_where_a_call_names_none(
    triton: FakeTriton, url: str
) -> None:
    triton.gate.clear()
    with Client(url, timeout=SHORT_S) as client, pytest.raises(RequestTimeout):
        client.generate("a cat")


def test_a_socket_that_accepts_and_says_nothing_is_a_timeout() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        for scheme in ("grpc://", "http://"):
            url = f"{scheme}127.0.0.1:{silent.getsockname()[1]}"
            with Client(url) as client, pytest.raises(RequestTimeout):
                client.generate("a cat", timeout=SHORT_S)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("scheme", ["grpc://", "http://"])
def test_a_socket_that_accepts_and_says_nothing_is_not_ready(scheme: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"{scheme}127.0.0.1:{silent.getsockname()[1]}"
        with Client(url, timeout=SHORT_S) as client:
            assert not client.is_ready()


def test_leaving_after_the_timeout_cancels_the_grpc_call(triton: FakeTriton) -> None:
    triton.gate.clear()
    with Client(triton.grpc_url) as client, pytest.raises(RequestTimeout):
        client.generate("a cat", timeout=SHORT_S)

    assert triton.is_cancelled.wait(LONG_S)


def test_leaving_after_the_timeout_cancels_the_http_request_by_its_id(triton: FakeTriton) -> None:
    """Triton would not tell the model."""
    triton.gate.clear()
    with Client(triton.http_url) as client, pytest.raises(RequestTimeout):
        client.generate("a cat", request_id="mine", timeout=SHORT_S)

    assert triton.cancelled_ids == ["mine"]


def test_ctrl_c_cancels_the_http_request_by_its_id(triton: FakeTriton) -> None:
    triton.gate.clear()
    interrupt = threading.Timer(SHORT_S, os.kill, (os.getpid(), signal.SIGINT))
    interrupt.start()
    with Client(triton.http_url) as client, pytest.raises(KeyboardInterrupt):
        client.generate("a cat", request_id="mine", timeout=LONG_S)

    interrupt.join()
    assert triton.cancelled_ids == ["mine"]


def test_ctrl_c_cancels_the_grpc_call(triton: FakeTriton) -> None:
    triton.gate.clear()
    interrupt = threading.Timer(SHORT_S, os.kill, (os.getpid(), signal.SIGINT))
    interrupt.start()
    with Client(triton.grpc_url) as client, pytest.raises(KeyboardInterrupt):
        client.generate("a cat", timeout=LONG_S)

    interrupt.join()
    assert triton.is_cancelled.wait(LONG_S)


def test_a_cancel_that_fails_does_not_hide_the_timeout(triton: FakeTriton) -> None:
    triton.gate.clear()
    triton.models.discard("stable_diffusion_cancel")
    with Client(triton.http_url) as client, pytest.raises(RequestTimeout):
        client.generate("a cat", timeout=SHORT_S)


def test_what_the_server_has_answered_is_not_cancelled(triton: FakeTriton) -> None:
    with Client(triton.http_url) as client:
        client.generate("a cat")
        for code, message in (
            (grpc.StatusCode.INVALID_ARGUMENT, "width: 3 is out of range"),
            (grpc.StatusCode.CANCELLED, "timeout_ms: 50 ran out"),
        ):
            triton.failure = (code, message)
            with pytest.raises(DarkroomError):
                client.generate("a cat")

    assert triton.cancelled_ids == []


@pytest.mark.parametrize("request_id", [None, "mine"])
def test_a_request_carries_an_id(triton: FakeTriton, url: str, request_id: str | None) -> None:
    with Client(url) as client:
        for _ in range(2):
            client.generate("a cat", request_id=request_id)

    if request_id is None:
        assert len(set(triton.request_ids)) == 2
        assert {len(it) for it in triton.request_ids} == {32}
    else:
        assert triton.request_ids == [request_id, request_id]


def http_answer(body: bytes, status: str = "200 OK") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


@pytest.mark.parametrize(
    ("raw", "error"),
    [
        pytest.param(b"", ServerUnavailable, id="hangs up"),
        pytest.param(http_answer(b"{}")[:-1], ServerUnavailable, id="hangs up early"),
        pytest.param(b"SSH-2.0-OpenSSH\r\n", ServerUnavailable, id="not HTTP"),
        pytest.param(http_answer(b"hello"), ServerError, id="not JSON"),
        pytest.param(http_answer(b"{}"), ServerError, id="no outputs"),
        pytest.param(http_answer(b"hello", "500 Oops"), ServerError, id="500 without JSON"),
        pytest.param(http_answer(b"", "503 Busy"), ServerUnavailable, id="503 without a body"),
    ],
)
def test_nonsense_over_http_is_an_error_of_ours(
    triton: FakeTriton, raw: bytes, error: type[DarkroomError]
) -> None:
    triton.raw_http = raw
    with Client(triton.http_url) as client, pytest.raises(error):
        client.generate("a cat", timeout=LONG_S)


def test_the_ports_mixed_up_is_server_unavailable(triton: FakeTriton) -> None:
    mixed_up: list[Callable[[], Client]] = [
        lambda: Client(f"http://{triton.grpc_url}"),
        lambda: Client(triton.http_url.removeprefix("http://")),
    ]
    for make in mixed_up:
        with make() as client, pytest.raises(ServerUnavailable):
            client.generate("a cat", timeout=LONG_S)
