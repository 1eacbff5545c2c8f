"""`darkroom probe`: one line, and an exit status that says whether a server makes pictures."""

import socket
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from fake_triton import Arrays, Failure, FakeTriton, paint

from darkroom.cli import main


def refusing_width_1(message: str) -> Callable[[dict[str, Any]], Arrays]:
    def answer(fields: dict[str, Any]) -> Arrays:
        if fields.get("width") == 1:
            raise Failure(grpc.StatusCode.INVALID_ARGUMENT, message)
        return paint(fields)

    return answer


def refusal(capsys: pytest.CaptureFixture[str]) -> str:
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("darkroom: ")
    assert len(err.splitlines()) == 1
    return err


def test_a_probe_asks_for_the_smallest_picture_that_the_server_allows(
    triton: FakeTriton, capsys: pytest.CaptureFixture[str]
) -> None:
    triton.answer = refusing_width_1("width: 1 is out of range, allowed are 24 to 128")
    status = main(["probe", "--url", triton.grpc_url])

    assert status == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{triton.grpc_url} is alive: it made a picture of 24x24 in ")
    assert len(out.splitlines()) == 1
    asked = triton.requests[-1]
    assert asked.pop("seed") >= 0
    assert asked == {
        "prompt": "",
        "num_inference_steps": 1,
        "guidance_scale": 1.0,
        "width": 24,
        "height": 24,
        "priority": 10,
    }


@pytest.mark.parametrize("message", ["width: 1 is too narrow", "sampler: is missing"])
def test_a_probe_asks_for_no_size_if_the_server_tells_none(
    triton: FakeTriton, message: str
) -> None:
    triton.answer = refusing_width_1(message)

    assert main(["probe", "--url", triton.grpc_url]) == 0
    assert triton.requests[-1].keys().isdisjoint({"width", "height"})


def test_no_two_probes_are_equal(triton: FakeTriton) -> None:
    """A response cache would answer the second one, whatever has become of the engine."""
    for _ in range(2):
        assert main(["probe", "--url", triton.grpc_url]) == 0

    seeds = {fields["seed"] for fields in triton.requests}
    assert len(seeds) == len(triton.requests)


def test_a_probe_over_http(triton: FakeTriton) -> None:
    assert main(["probe", "--url", triton.http_url]) == 0


def test_a_full_queue_is_alive(triton: FakeTriton, capsys: pytest.CaptureFixture[str]) -> None:
    message = "the queue is full: 9 pictures are waiting, 9 may wait; retry_after_ms: 850"
    triton.failure = (grpc.StatusCode.UNAVAILABLE, message)

    assert main(["probe", "--url", triton.grpc_url]) == 0
    assert capsys.readouterr().out == f"{triton.grpc_url} is alive: {message}\n"


def test_a_server_that_fails_is_not(triton: FakeTriton, capsys: pytest.CaptureFixture[str]) -> None:
    triton.failure = (grpc.StatusCode.INTERNAL, "unet failed: out of memory")

    assert main(["probe", "--url", triton.grpc_url]) == 1
    assert refusal(capsys) == "darkroom: unet failed: out of memory\n"


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_a_server_that_does_not_answer_is_not(
    triton: FakeTriton, capsys: pytest.CaptureFixture[str], protocol: str
) -> None:
    triton.gate.clear()
    url = triton.grpc_url if protocol == "grpc" else triton.http_url

    assert main(["probe", "--url", url, "--timeout", "0.2"]) == 1
    assert refusal(capsys) == f"darkroom: {url}: no picture within 0.2 s\n"


def test_nobody_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        url = f"127.0.0.1:{sock.getsockname()[1]}"

        assert main(["probe", "--url", url]) == 1
    assert url in refusal(capsys)


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf", "soon"])
@pytest.mark.parametrize(
    "command", [["probe", "--timeout"], ["serve", "repository", "--probe-timeout"]]
)
def test_a_timeout_that_is_none_shows_the_usage(
    capsys: pytest.CaptureFixture[str], command: list[str], seconds: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*command, seconds])

    assert caught.value.code == 2
    assert f"{seconds!r} is not a number of seconds above 0" in capsys.readouterr().err
