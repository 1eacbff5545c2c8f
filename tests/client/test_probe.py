"""`darkroom probe`: one line, and an exit status that says whether a server makes pictures."""

import re
import socket
from io import BytesIO
from typing import Any

import grpc
import pytest
from fake_triton import MODEL_INFO, FakeTriton
from PIL import Image

from darkroom.cli import main


def tell_modes(triton: FakeTriton, *modes: str) -> None:
    triton.catalog = [{**MODEL_INFO, "limits": {"min_size": 24}, "modes": list(modes)}]


def colours(encoded: bytes) -> tuple[str, tuple[int, int], Any]:
    """The mode, the size and the least and the most of each channel."""
    with Image.open(BytesIO(encoded)) as picture:
        return picture.mode, picture.size, picture.getextrema()


def refusal(capsys: pytest.CaptureFixture[str]) -> str:
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("darkroom: ")
    assert len(err.splitlines()) == 1
    return err


def test_a_probe_asks_for_the_smallest_picture_that_the_server_allows(
    triton: FakeTriton, capsys: pytest.CaptureFixture[str]
) -> None:
    tell_modes(triton, "text2img", "img2img", "inpaint")
    status = main(["probe", "--url", triton.grpc_url])

    assert status == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{triton.grpc_url} is alive: it made a picture of 24x24 in ")
    assert len(out.splitlines()) == 1
    (asked,) = triton.requests
    assert asked.pop("seed") >= 0
    assert asked == {
        "prompt": "",
        "num_inference_steps": 1,
        "guidance_scale": 1.0,
        "width": 24,
        "height": 24,
        "priority": 10,
    }


@pytest.mark.parametrize("modes", [("img2img", "inpaint"), ("inpaint",)])
def test_a_probe_starts_from_a_picture_where_a_text_alone_is_refused(
    triton: FakeTriton, modes: tuple[str, ...]
) -> None:
    tell_modes(triton, *modes)

    assert main(["probe", "--url", triton.grpc_url]) == 0
    (asked,) = triton.requests
    assert (asked["width"], asked["height"], asked["num_inference_steps"]) == (24, 24, 1)
    # Of one step, the default of pictures to start from would leave none.
    assert asked["strength"] == 1.0
    assert colours(asked["image"]) == ("RGB", (24, 24), ((128, 128),) * 3)
    if modes == ("inpaint",):
        assert colours(asked["mask_image"]) == ("L", (24, 24), (255, 255))
    else:
        assert "mask_image" not in asked


@pytest.mark.parametrize("untold", [{"limits": {}}, {"modes": []}])
def test_a_server_that_does_not_tell_what_to_ask_for_is_one_line(
    triton: FakeTriton, capsys: pytest.CaptureFixture[str], untold: dict[str, Any]
) -> None:
    triton.catalog = [{**MODEL_INFO, **untold}]

    assert main(["probe", "--url", triton.grpc_url]) == 1
    assert "tells no size or mode of stable_diffusion" in refusal(capsys)
    assert triton.requests == []


def test_a_probe_asks_the_model_that_is_named(
    triton: FakeTriton, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["probe", "--url", triton.grpc_url, "--model", "refiner"]

    assert main(options) == 1
    assert refusal(capsys) == "darkroom: model: 'refiner' does not exist\n"
    triton.models.add("refiner")
    triton.catalog = [MODEL_INFO, {**MODEL_INFO, "model": "refiner", "limits": {"min_size": 16}}]
    assert main(options) == 0
    assert "16x16" in capsys.readouterr().out


def test_no_two_probes_are_equal(triton: FakeTriton) -> None:
    """A response cache would answer the second one, whatever has become of the engine."""
    for _ in range(2):
        assert main(["probe", "--url", triton.grpc_url]) == 0

    assert len({fields["seed"] for fields in triton.requests}) == 2


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
    pattern = rf"darkroom: {re.escape(url)}: no picture within \d\.\d s\n"
    assert re.fullmatch(pattern, refusal(capsys))


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
