"""The `darkroom` command: pictures, refusals in one line on stderr, and exit statuses."""

import importlib.util
import json
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr
from importlib import metadata
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from fake_triton import (
    INFO,
    MODEL_INFO,
    Arrays,
    FakeTriton,
    encode_latents,
    encode_picture,
    narrate,
    paint,
    tell,
)
from missing_packages import run_without
from PIL import Image, ImageChops

from darkroom.cli import main

has_torch = importlib.util.find_spec("torch") is not None
needs_export = pytest.mark.skipif(not has_torch, reason="the export extra is not installed")

WAIT_S = 30.0
RUN_MAIN = "from darkroom.cli import main; sys.exit(main(sys.argv[1:]))"


def generate(triton: FakeTriton, output: Path, *options: str) -> int:
    return main(["generate", "a cat", "--url", triton.grpc_url, "-o", str(output), *options])


def refusal(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a failed command says for itself."""
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if line.startswith("darkroom: ")]
    assert len(lines) == 1
    assert "Traceback" not in err
    return lines[0]


def test_generate_writes_the_png_as_the_server_sent_it(
    triton: FakeTriton, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = generate(triton, tmp_path / "cat.png", "--seed", "7")

    assert status == 0
    assert (tmp_path / "cat.png").read_bytes() == encode_picture(7)
    assert capsys.readouterr().out == f"{tmp_path / 'cat.png'}: 16x8, seed 7\n"


@pytest.mark.parametrize(("suffix", "kind"), [("jpg", "JPEG"), ("webp", "WEBP"), ("bmp", "BMP")])
def test_generate_converts_to_what_the_suffix_says(
    triton: FakeTriton, tmp_path: Path, suffix: str, kind: str
) -> None:
    status = generate(triton, tmp_path / f"cat.{suffix}", "--seed", "7")

    assert status == 0
    with Image.open(tmp_path / f"cat.{suffix}") as opened:
        assert (opened.format, opened.size) == (kind, (16, 8))


def test_generate_sends_its_options_and_nothing_else(triton: FakeTriton, tmp_path: Path) -> None:
    numbers = ("--num-inference-steps", "4", "--guidance-scale", "1.5", "--seed", "0")
    numbers += ("--guidance-rescale", "0.5", "--guidance-start", "0.25", "--guidance-stop", "0.75")
    numbers += ("--eta", "1", "--clip-skip", "1", "--max-embeddings-multiples", "3")
    size = ("--width", "32", "--height", "24")
    texts = ("--negative-prompt", "a dog", "--sampler", "ddim", "--timestep-spacing", "trailing")
    generate(triton, tmp_path / "cat.png", *numbers, *size, *texts)
    generate(triton, tmp_path / "cat.png", "--seed", "1")

    assert triton.requests == [
        {
            "prompt": "a cat",
            "negative_prompt": "a dog",
            "num_inference_steps": 4,
            "guidance_scale": 1.5,
            "seed": 0,
            "width": 32,
            "height": 24,
            "guidance_rescale": 0.5,
            "guidance_start": 0.25,
            "guidance_stop": 0.75,
            "sampler": "ddim",
            "eta": 1.0,
            "timestep_spacing": "trailing",
            "clip_skip": 1,
            "max_embeddings_multiples": 3,
        },
        {"prompt": "a cat", "seed": 1},
    ]


def test_generate_sends_pictures_and_adapters(triton: FakeTriton, tmp_path: Path) -> None:
    picture = encode_picture(9)
    for name in ("dog.png", "mask.png", "edges:1.png", "depths"):
        (tmp_path / name).write_bytes(picture)
    pictures = ("--image", str(tmp_path / "dog.png"), "--mask-image", str(tmp_path / "mask.png"))
    canny, depth = f"canny={tmp_path / 'edges:1.png'}", f"depth={tmp_path / 'depths'}:0.5"
    controls = ("--control", canny, "--control", depth)
    adapters = ("--lora", "ink:0.75", "--lora", "wash", "--variant", "watercolor")
    status = generate(
        triton,
        tmp_path / "cat.png",
        *("--seed", "7", "--strength", "0.5"),
        *(*pictures, *controls, *adapters),
    )

    assert status == 0
    assert triton.requests == [
        {
            "prompt": "a cat",
            "seed": 7,
            "image": picture,
            "mask_image": picture,
            "strength": 0.5,
            "controlnet": ["canny", "depth"],
            "control_image": [picture, picture],
            "controlnet_conditioning_scale": [1.0, 0.5],
            "lora": ["ink", "wash"],
            "lora_scale": [0.75, 1.0],
            "variant": "watercolor",
        }
    ]


def test_scales_that_are_left_out_are_the_servers(triton: FakeTriton, tmp_path: Path) -> None:
    (tmp_path / "edges.png").write_bytes(encode_picture(9))
    control = f"canny={tmp_path / 'edges.png'}"
    status = generate(triton, tmp_path / "cat.png", "--control", control, "--lora", "ink")

    assert status == 0
    assert triton.requests[0].keys() == {"prompt", "seed", "controlnet", "control_image", "lora"}


@pytest.mark.parametrize("option", ["--image", "--mask-image", "--control"])
def test_a_picture_that_cannot_be_read_is_one_line(
    triton: FakeTriton, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    path = tmp_path / "dog.png"
    value = f"canny={path}" if option == "--control" else str(path)
    status = generate(triton, tmp_path / "cat.png", option, value)

    assert status == 1
    assert f"image: {path}: No such file" in refusal(capsys)
    assert triton.requests == []


@pytest.mark.parametrize("is_watched", [False, True])
def test_generate_saves_several_pictures(
    triton: FakeTriton, tmp_path: Path, capsys: pytest.CaptureFixture[str], *, is_watched: bool
) -> None:
    with redirect_stderr(Terminal() if is_watched else StringIO()):
        status = generate(triton, tmp_path / "cat.png", "--seed", "7", "--num-images", "3")

    assert status == 0
    names = [f"cat-{index}.png" for index in range(3)]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    for index, name in enumerate(names):
        assert (tmp_path / name).read_bytes() == encode_picture(7 + index)
    expected = [f"{tmp_path / name}: 16x8, seed {7 + index}" for index, name in enumerate(names)]
    assert capsys.readouterr().out.splitlines() == expected
    assert triton.requests[0]["num_images_per_prompt"] == 3


def test_one_of_several_pictures_has_no_number(triton: FakeTriton, tmp_path: Path) -> None:
    assert generate(triton, tmp_path / "cat.png", "--num-images", "1") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["cat.png"]


def test_one_of_several_files_that_cannot_be_written_is_refused_before_the_work(
    triton: FakeTriton, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cat-1.png").mkdir()

    assert generate(triton, tmp_path / "cat.png", "--num-images", "2") == 1
    assert f"{tmp_path / 'cat-1.png'}: is a folder" in refusal(capsys)
    assert triton.requests == []


def test_a_preview_is_that_of_the_first_picture(triton: FakeTriton, tmp_path: Path) -> None:
    def script(fields: dict[str, Any], _stop: threading.Event) -> Iterator[Arrays]:
        for index, color in ((0, 100), (1, 200)):
            where = {"index": index, "step": 1, "num_steps": 1}
            preview = np.array([encode_picture(color)], object)
            yield {**tell(type="preview", **where), "preview": preview}
        yield {**tell(type="done"), **paint(fields)}

    triton.script = script
    preview = tmp_path / "preview.png"
    options = ("--num-images", "2", "--preview", str(preview))

    assert generate(triton, tmp_path / "cat.png", *options) == 0
    with Image.open(preview) as opened:
        assert opened.getpixel((0, 0)) == (100, 20, 30)


@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_generate_asks_the_model_that_is_named(
    triton: FakeTriton, tmp_path: Path, capsys: pytest.CaptureFixture[str], scheme: str
) -> None:
    url = {"grpc": triton.grpc_url, "http": triton.http_url}[scheme]
    options = ("--model", "sdxl", "--url", url)

    assert generate(triton, tmp_path / "cat.png", *options) == 1
    assert "unknown model: 'sdxl'" in refusal(capsys)
    triton.models.add("sdxl")
    assert generate(triton, tmp_path / "cat.png", *options) == 0


@pytest.mark.parametrize("end", [None, "0.7"])
def test_a_refiner_goes_on_from_where_the_model_ends(
    triton: FakeTriton, tmp_path: Path, capsys: pytest.CaptureFixture[str], end: str | None
) -> None:
    triton.models.add("refiner")
    (tmp_path / "dog.png").write_bytes(encode_picture(9))
    options = ["--seed", "7", "--num-inference-steps", "4", "--width", "32", "--height", "24"]
    options += ["--lora", "ink:0.5", "--image", str(tmp_path / "dog.png"), "--strength", "0.5"]
    options += ["--num-images", "2", "--refiner", "refiner"]
    status = generate(
        triton, tmp_path / "cat.png", *options, *(("--denoising-end", end) if end else ())
    )

    assert status == 0
    begun, *refined = triton.requests
    fraction = np.float32(end or 0.8)
    assert begun == {
        "prompt": "a cat",
        "seed": 7,
        "num_inference_steps": 4,
        "width": 32,
        "height": 24,
        "lora": ["ink"],
        "lora_scale": [0.5],
        "image": encode_picture(9),
        "strength": 0.5,
        "num_images_per_prompt": 2,
        "denoising_end": fraction,
        "output_format": "latent",
    }
    assert refined == [
        {
            "prompt": "a cat",
            "seed": seed,
            "num_inference_steps": 4,
            "image": encode_latents(seed, (32, 24)),
            "denoising_start": fraction,
        }
        for seed in (7, 8)
    ]
    assert (tmp_path / "cat-1.png").read_bytes() == encode_picture(8)
    told = [line.split("  ")[0] for line in capsys.readouterr().err.split("\r")]
    assert told == ["", "+ generating", "+ refining", "+ refining"]


def test_the_refiners_steps_are_shown_on_a_terminal(triton: FakeTriton, tmp_path: Path) -> None:
    triton.models.update({"refiner", "refiner_stream"})
    with redirect_stderr(Terminal()) as terminal:
        assert generate(triton, tmp_path / "cat.png", "--refiner", "refiner") == 0

    assert "> refining: step 3 of 3" in terminal.getvalue()


def test_a_refiner_that_is_not_there_is_one_line(
    triton: FakeTriton, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(triton, tmp_path / "cat.png", "--refiner", "refiner") == 1
    assert "unknown model: 'refiner'" in refusal(capsys)


def test_leaving_off_needs_a_refiner(
    triton: FakeTriton, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(triton, tmp_path / "cat.png", "--denoising-end", "0.8") == 1
    assert refusal(capsys) == "darkroom: --denoising-end: needs --refiner, to go on from there"
    assert triton.requests == []


@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_info_tells_of_all_models(
    triton: FakeTriton, capsys: pytest.CaptureFixture[str], scheme: str
) -> None:
    url = {"grpc": triton.grpc_url, "http": triton.http_url}[scheme]
    triton.catalog = [MODEL_INFO, {**MODEL_INFO, "model": "refiner"}]

    assert main(["info", "--url", url]) == 0
    first, second = capsys.readouterr().out.rstrip("\n").split("\n\n")
    assert first.startswith("stable_diffusion\n  checkpoint      shapes, sd1\n")
    assert second.startswith("refiner\n")


def test_info_tells_of_one_model(triton: FakeTriton, capsys: pytest.CaptureFixture[str]) -> None:
    triton.catalog = [MODEL_INFO, {**MODEL_INFO, "model": "refiner"}]

    assert main(["info", "refiner", "--url", triton.grpc_url]) == 0
    assert capsys.readouterr().out.startswith("refiner\n")
    assert main(["info", "sdxl", "--url", triton.grpc_url]) == 1
    assert refusal(capsys) == "darkroom: model: 'sdxl' does not exist"


def test_info_repeats_what_the_server_said_as_json(
    triton: FakeTriton, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["info", "--json", "--url", triton.grpc_url]) == 0
    assert json.loads(capsys.readouterr().out) == [MODEL_INFO]
    assert main(["info", "stable_diffusion", "--json", "--url", triton.grpc_url]) == 0
    assert json.loads(capsys.readouterr().out) == MODEL_INFO


def test_info_says_when_there_is_nothing(
    triton: FakeTriton, capsys: pytest.CaptureFixture[str]
) -> None:
    triton.catalog = []

    assert main(["info", "--url", triton.grpc_url]) == 0
    assert capsys.readouterr().out == f"{triton.grpc_url} serves no model\n"
    assert main(["info", "--json", "--url", triton.grpc_url]) == 0
    assert json.loads(capsys.readouterr().out) == []


class Terminal(StringIO):
    """A stderr that somebody watches."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_generate_shows_the_steps_on_a_terminal(
    triton: FakeTriton,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    scheme: str,
) -> None:
    """And the rest is as it is elsewhere."""
    url = {"grpc": triton.grpc_url, "http": triton.http_url}[scheme]
    with redirect_stderr(Terminal()) as terminal:
        status = generate(triton, tmp_path / "cat.png", "--seed", "7", "--url", url)

    assert status == 0
    shown = [line.split("  ")[0] for line in terminal.getvalue().split("\r")]
    assert shown == [
        "",
        "> generating: waiting, 0 ahead",
        "> generating: step 1 of 3",
        "> generating: step 2 of 3",
        "> generating: step 3 of 3",
        "+ generating",
    ]
    assert terminal.getvalue().endswith("\n")
    assert (tmp_path / "cat.png").read_bytes() == encode_picture(7)
    assert capsys.readouterr().out == f"{tmp_path / 'cat.png'}: 16x8, seed 7\n"
    assert "preview_interval" not in triton.requests[0]


def test_generate_streams_for_nobody(
    triton: FakeTriton, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    triton.models.discard("stable_diffusion_stream")

    assert generate(triton, tmp_path / "cat.png") == 0
    assert capsys.readouterr().err.startswith("\r+ generating ")


def test_an_error_in_a_stream_is_one_line(triton: FakeTriton, tmp_path: Path) -> None:
    triton.failure = (grpc.StatusCode.INTERNAL, "unet failed: out of memory")
    with redirect_stderr(Terminal()) as terminal:
        status = generate(triton, tmp_path / "cat.png")

    assert status == 1
    failed, message, _ = terminal.getvalue().split("\n")
    assert failed.strip().startswith("x generating ")
    assert message == "darkroom: unet failed: out of memory"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_generate_keeps_the_latest_preview(
    triton: FakeTriton, tmp_path: Path, capsys: pytest.CaptureFixture[str], suffix: str
) -> None:
    preview = tmp_path / f"preview.{suffix}"
    seen = []

    def script(fields: dict[str, Any], stop: threading.Event) -> Iterator[Arrays]:
        for answer in narrate(fields, stop):
            yield answer
            if "preview" in answer:
                seen.append(answer["preview"][0])

    triton.script = script
    status = generate(triton, tmp_path / "cat.png", "--preview", str(preview))

    assert status == 0
    assert len(seen) == 3
    with Image.open(preview) as opened, Image.open(BytesIO(seen[-1])) as last:
        difference = ImageChops.difference(opened.convert("RGB"), last)
        assert max(high for _, high in difference.getextrema()) <= 3
    assert {path.name for path in tmp_path.iterdir()} == {"cat.png", preview.name}
    assert capsys.readouterr().err.startswith("\r+ generating ")


@pytest.mark.parametrize("name", ["preview.xyz", "no-such-folder/preview.png", "folder.png"])
def test_a_preview_that_cannot_be_written_is_refused_before_the_work(
    triton: FakeTriton, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (tmp_path / "folder.png").mkdir()
    status = generate(triton, tmp_path / "cat.png", "--preview", str(tmp_path / name))

    assert status == 1
    assert str((tmp_path / name).parent) in refusal(capsys)
    assert triton.requests == []


def test_a_preview_that_turns_out_not_to_be_writable_ends_the_request(
    triton: FakeTriton, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No RGB picture fits into an XBM file."""
    status = generate(triton, tmp_path / "cat.png", "--preview", str(tmp_path / "preview.xbm"))

    assert status == 1
    assert f"{tmp_path / 'preview.xbm'}: " in refusal(capsys)
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_cancels_the_request(triton: FakeTriton, tmp_path: Path) -> None:
    def script(_fields: dict[str, Any], stop: threading.Event) -> Iterator[Arrays]:
        yield tell(type="queued", position=4)
        os.kill(os.getpid(), signal.SIGINT)
        stop.wait(WAIT_S)

    triton.script = script
    with redirect_stderr(Terminal()) as terminal:
        status = generate(triton, tmp_path / "cat.png")

    assert status == 130
    assert triton.is_cancelled.wait(WAIT_S)
    assert terminal.getvalue().split("\r")[-1].startswith("x generating ")


@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_cancel_ends_a_request_by_its_id(
    triton: FakeTriton, tmp_path: Path, capsys: pytest.CaptureFixture[str], scheme: str
) -> None:
    url = {"grpc": triton.grpc_url, "http": triton.http_url}[scheme]
    triton.gate.clear()
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(generate, triton, tmp_path / "cat.png", "--request-id", "mine")
        triton.wait_for_requests(1, WAIT_S)
        assert main(["cancel", "mine", "--url", url]) == 0
        assert asked.result() == 1

    captured = capsys.readouterr()
    assert captured.out == "mine: cancelled\n"
    assert "darkroom: the request was cancelled\n" in captured.err


def test_cancel_asks_the_model_that_is_named(
    triton: FakeTriton, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("cancel", "mine", "--url", triton.grpc_url, "--model", "sdxl")

    assert main(options) == 1
    assert "unknown model: 'sdxl_cancel'" in refusal(capsys)
    triton.models.add("sdxl_cancel")
    assert main(options) == 1
    assert triton.cancelled_ids == ["mine"]


def test_cancelling_what_does_not_run_is_one_line(
    triton: FakeTriton, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cancel", "mine", "--url", triton.grpc_url]) == 1
    assert refusal(capsys) == "darkroom: mine: no such request is waiting or running"
    assert main(["cancel", "", "--url", triton.grpc_url]) == 1
    assert refusal(capsys).startswith("darkroom: request_id: ''")


def test_generate_asks_over_http_too(triton: FakeTriton, tmp_path: Path) -> None:
    output = tmp_path / "cat.png"

    assert main(["generate", "a cat", "--url", triton.http_url, "-o", str(output)]) == 0
    assert output.exists()


def test_generate_tells_the_servers_notes(
    triton: FakeTriton, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    info = {**INFO, "notes": ["prompt: too long"]}
    triton.answer = lambda fields: {
        **paint(fields),
        "info": np.array([json.dumps(info).encode()], object),
    }
    generate(triton, tmp_path / "cat.png")

    assert "note: prompt: too long\n" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["cat.xyz", "cat", "no-such-folder/cat.png", "folder.png"])
def test_a_file_that_cannot_be_written_is_refused_before_the_work(
    triton: FakeTriton, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (tmp_path / "folder.png").mkdir()
    status = generate(triton, tmp_path / name)

    assert status == 1
    assert str((tmp_path / name).parent) in refusal(capsys)
    assert triton.requests == []
    assert [path.name for path in tmp_path.iterdir()] == ["folder.png"]


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, "width: 3 is out of range, allowed are 32 to 128"),
        (grpc.StatusCode.UNAVAILABLE, "the queue is full: 9 pictures are waiting"),
        (grpc.StatusCode.INTERNAL, "unet failed: out of memory"),
    ],
)
def test_an_error_of_the_server_is_one_line(
    triton: FakeTriton,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    code: grpc.StatusCode,
    message: str,
) -> None:
    triton.failure = (code, message)
    status = generate(triton, tmp_path / "cat.png")

    assert status == 1
    assert refusal(capsys) == f"darkroom: {message}"
    assert list(tmp_path.iterdir()) == []


def test_nobody_listening_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        url = f"127.0.0.1:{sock.getsockname()[1]}"
        status = main(["generate", "a cat", "--url", url, "-o", str(tmp_path / "cat.png")])

    assert status == 1
    assert url in refusal(capsys)


def test_a_malformed_address_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = main(["generate", "a cat", "--url", "nowhere", "-o", str(tmp_path / "cat.png")])

    assert status == 1
    assert refusal(capsys).startswith("darkroom: url: 'nowhere' is not host:port")


def test_the_timeout_is_kept(
    triton: FakeTriton, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    triton.gate.clear()
    status = generate(triton, tmp_path / "cat.png", "--timeout", "0.2")

    assert status == 1
    assert "Deadline Exceeded" in refusal(capsys)


def test_serving_what_is_no_repository_names_the_missing_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for repository in (tmp_path, tmp_path / "nowhere"):
        assert main(["serve", str(repository)]) == 1
        message = refusal(capsys)
        assert f"{repository / 'manifest.json'} is missing" in message
        assert "darkroom export CHECKPOINT REPOSITORY makes one" in message


def test_serving_a_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")

    assert main(["serve", str(file)]) == 1
    assert str(file) in refusal(capsys)


@pytest.mark.parametrize(
    "text",
    ["", "no JSON", "[]", "3", "{}", '{"networks": {}}', '{"networks": 3}', "\N{NULL}"],
)
def test_serving_a_malformed_manifest_names_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    (tmp_path / "manifest.json").write_text(text)

    assert main(["serve", str(tmp_path)]) == 1
    assert f"{tmp_path / 'manifest.json'}: malformed" in refusal(capsys)


def test_serving_a_manifest_that_is_not_text_names_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "manifest.json").write_bytes(b"\xff\xfe\0")

    assert main(["serve", str(tmp_path)]) == 1
    assert f"{tmp_path / 'manifest.json'}: malformed" in refusal(capsys)


def test_serve_without_its_extra_gives_the_pip_command(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"networks": {}, "limits": {"min_size": 32}}')
    result = run_without({"pytriton"}, RUN_MAIN, "serve", str(tmp_path))

    assert result.returncode == 1
    assert "pip install 'darkroom[serve]'" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("command", "missing"),
    [
        (("export", "checkpoint", "repository"), "torch"),
        (("export", "checkpoint", "repository"), "diffusers"),
        (("export", "checkpoint", "repository"), "onnxruntime"),
        (("random-checkpoint", "tiny-sd15", "folder"), "torch"),
        (("plan", "sd15"), "torch"),
        (("plan", "sd15"), "diffusers"),
    ],
)
def test_exporting_without_the_extra_gives_the_pip_command(
    command: tuple[str, ...], missing: str
) -> None:
    if missing != "torch" and not has_torch:
        pytest.skip("the export extra is not installed")
    result = run_without({missing}, RUN_MAIN, *command)

    assert result.returncode == 1
    assert f"this needs the package {missing}: pip install 'darkroom[export]'" in result.stderr
    assert "Traceback" not in result.stderr


def test_http_without_its_extra_gives_the_pip_command() -> None:
    result = run_without(
        {"gevent", "geventhttpclient"}, RUN_MAIN, "generate", "a cat", "--url", "http://localhost:1"
    )

    assert result.returncode == 1
    assert "pip install 'darkroom[http]'" in result.stderr
    assert "Traceback" not in result.stderr


@needs_export
@pytest.mark.torch
def test_an_unknown_architecture_is_named_with_those_that_exist(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = main(["random-checkpoint", "sd99", str(tmp_path / "sd99")])

    assert status == 1
    assert "'sd99' does not exist, there are sd15, " in refusal(capsys)
    assert not (tmp_path / "sd99").exists()


@needs_export
@pytest.mark.torch
def test_exporting_an_unknown_pipeline_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    status = main(["export", str(tmp_path), str(tmp_path / "repository")])

    assert status == 1
    assert "FluxPipeline is not supported" in refusal(capsys)


@needs_export
@pytest.mark.torch
def test_exporting_nothing_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["export", str(tmp_path / "nowhere"), str(tmp_path / "repository")])

    assert status == 1
    assert f"{tmp_path / 'nowhere'}: no such folder" in refusal(capsys)


Export = Callable[..., dict[str, Any]]


@pytest.fixture
def export(monkeypatch: pytest.MonkeyPatch) -> Export:
    """Runs `darkroom export` and gives what the exporter, which does nothing, is asked for."""
    import darkroom_export

    def export(*options: str) -> dict[str, Any]:
        asked: dict[str, Any] = {}

        def export_checkpoint(checkpoint: str, repository: Path, **given: Any) -> bool:
            asked.update(given, checkpoint=checkpoint, repository=repository)
            return True

        monkeypatch.setattr(darkroom_export, "export_checkpoint", export_checkpoint)
        assert main(["export", "checkpoint", "repository", *options]) == 0
        return asked

    return export


@needs_export
@pytest.mark.torch
def test_an_export_has_no_loras_by_itself(export: Export) -> None:
    asked = export()

    assert (asked["checkpoint"], asked["repository"]) == ("checkpoint", Path("repository"))
    assert (asked["variants"], asked["loras"], asked["fused_loras"]) == ({}, {}, [])


@needs_export
@pytest.mark.torch
@pytest.mark.parametrize(
    ("value", "name", "file"),
    [
        ("loras/ink.safetensors", "ink", ("loras/ink.safetensors", 1.0)),
        ("loras/ink.safetensors:-0.5", "ink", ("loras/ink.safetensors", -0.5)),
        ("wash=ink.safetensors", "wash", ("ink.safetensors", 1.0)),
        ("wash=ink.safetensors:0.8", "wash", ("ink.safetensors", 0.8)),
        ("wash=a=b.safetensors", "wash", ("a=b.safetensors", 1.0)),
        ("./a=b.safetensors:2", "a=b", ("./a=b.safetensors", 2.0)),
        ("ink:1.safetensors", "ink:1", ("ink:1.safetensors", 1.0)),
        ("wash=a:b/ink:1.safetensors:0.5", "wash", ("a:b/ink:1.safetensors", 0.5)),
        ("ink.ckpt:1e-1", "ink", ("ink.ckpt", 0.1)),
    ],
)
def test_a_lora_is_a_variant(export: Export, value: str, name: str, file: object) -> None:
    assert export("--lora", value)["variants"] == {name: [file]}


@needs_export
@pytest.mark.torch
def test_loras_of_one_name_are_one_variant(export: Export) -> None:
    loras = ("wash=a.safetensors:0.5", "ink.safetensors", "wash=b.safetensors")
    asked = export(*(option for lora in loras for option in ("--lora", lora)))

    assert asked["variants"] == {
        "wash": [("a.safetensors", 0.5), ("b.safetensors", 1.0)],
        "ink": [("ink.safetensors", 1.0)],
    }
    assert (asked["loras"], asked["fused_loras"]) == ({}, [])


@needs_export
@pytest.mark.torch
def test_adapters_and_loras_for_all_are_kept_apart(export: Export) -> None:
    adapters = ("--adapter", "ink=ink.safetensors", "--adapter", "wash=a=b.safetensors")
    fused = ("--fuse-lora", "lcm.safetensors", "--fuse-lora", "b.safetensors:0.25")
    asked = export(*adapters, *fused)

    assert asked["loras"] == {"ink": "ink.safetensors", "wash": "a=b.safetensors"}
    assert asked["fused_loras"] == [("lcm.safetensors", 1.0), ("b.safetensors", 0.25)]
    assert asked["variants"] == {}


@needs_export
@pytest.mark.torch
@pytest.mark.parametrize("option", ["--adapter", "--controlnet"])
def test_a_name_that_is_given_twice_is_refused(
    capsys: pytest.CaptureFixture[str], option: str
) -> None:
    options = (option, "ink=a.safetensors", option, "ink=b.safetensors")

    assert main(["export", "checkpoint", "repository", *options]) == 1
    assert refusal(capsys) == f"darkroom: {option}: every name may be given once"


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("--lora", value) for value in ("", "wash=", "=ink.safetensors", ":0.5", "wash=:0.5")),
        *(("--lora", f"ink.safetensors:{scale}") for scale in ("", "much", "nan", "-inf")),
        ("--lora", "wash=ink.safetensors:nan"),
        *(("--adapter", value) for value in ("", "ink", "ink=", "=ink.safetensors")),
        *(("--fuse-lora", value) for value in ("", ":0.5", "ink.safetensors:nan", "a.ckpt:much")),
    ],
)
def test_a_lora_that_is_none_is_named(
    capsys: pytest.CaptureFixture[str], option: str, value: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["export", "checkpoint", "repository", option, value])

    assert caught.value.code == 2
    assert f"argument {option}: {value!r} is not " in capsys.readouterr().err


@needs_export
@pytest.mark.torch
def test_adapters_are_added_by_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import darkroom_export

    added = []
    monkeypatch.setattr(darkroom_export, "add_adapters", lambda *given: added.append(given))
    command = ["add-adapter", "repository", "ink=ink.safetensors", "wash=a=b.safetensors"]

    assert main(command) == 0
    files = {"ink": Path("ink.safetensors"), "wash": Path("a=b.safetensors")}
    assert added == [(Path("repository"), files)]
    assert capsys.readouterr().out.startswith("repository: has ink, wash; ")
    assert main([*command, "ink=b.safetensors"]) == 1
    assert refusal(capsys) == "darkroom: add-adapter: every name may be given once"
    assert len(added) == 1


@needs_export
@pytest.mark.torch
def test_adding_to_what_is_no_repository_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["add-adapter", str(tmp_path), "ink=ink.safetensors"]) == 1
    assert f"{tmp_path}: is no model repository of ours" in refusal(capsys)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])

    assert caught.value.code == 0
    assert capsys.readouterr().out == f"{metadata.version('darkroom')}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["develop"],
        ["generate"],
        ["generate", "a cat", "--seed", "one"],
        ["generate", "a cat", "--num-images", "0"],
        ["generate", "a cat", "--num-images", "two"],
        ["generate", "a cat", "--lora", "ink:much"],
        ["generate", "a cat", "--lora", ":1"],
        ["generate", "a cat", "--lora", "ink:nan"],
        ["generate", "a cat", "--control", "canny"],
        ["generate", "a cat", "--control", "canny="],
        ["generate", "a cat", "--control", "=edges.png"],
        ["info", "one", "two"],
        ["cancel"],
        ["export", "checkpoint", "repository", "--precision", "fp4"],
        ["export", "checkpoint", "repository", "--variant", "ink=ink.safetensors"],
        ["add-adapter", "repository"],
        ["add-adapter", "repository", "ink.safetensors"],
        ["add-lora", "repository", "ink=ink.safetensors"],
        ["serve", "repository", "--response-cache", "much"],
    ],
)
def test_misuse_shows_the_usage(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)

    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("usage: darkroom")
