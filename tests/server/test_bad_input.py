"""Bad input is INVALID_ARGUMENT with field, value and range; the next request is served."""

import json
import queue
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
from tritonclient.utils import InferenceServerException

from darkroom import Client, InvalidRequest
from darkroom.server import Server

DATATYPES = {"BYTES": np.object_, "INT32": np.int32, "INT64": np.int64, "FP32": np.float32}


@pytest.fixture(autouse=True)
def serves_the_next_request(client: Client) -> Iterator[None]:
    yield
    assert client.generate("a red circle", num_inference_steps=1).size


def inputs_of(*tensors: tuple[str, str, Any]) -> list[tritonclient.grpc.InferInput]:
    inputs = []
    for name, datatype, values in tensors:
        array = np.array(values, DATATYPES[datatype])
        tensor = tritonclient.grpc.InferInput(name, array.shape, datatype)
        tensor.set_data_from_numpy(array)
        inputs.append(tensor)
    return inputs


def ask_grpc(server: Server, *tensors: tuple[str, str, Any]) -> None:
    with tritonclient.grpc.InferenceServerClient(server.grpc_url) as triton:
        triton.infer("stable_diffusion", inputs_of(*tensors))


def ask_http(server: Server, endpoint: str, body: object) -> tuple[int, str]:
    request = urllib.request.Request(
        f"{server.http_url}/v2/models/stable_diffusion/{endpoint}", json.dumps(body).encode()
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


PROMPT = ("prompt", "BYTES", [b"a red circle"])


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (("num_inference_steps", "INT32", [0]), "num_inference_steps: 0 is out of range.* 1 to"),
        (("num_inference_steps", "INT32", [9999]), "num_inference_steps: 9999 is out of range"),
        (("width", "INT32", [100]), r"width: 100 is not a multiple of \d+"),
        (("height", "INT32", [4096]), r"height: 4096 is out of range, allowed are \d+ to \d+"),
        (("guidance_scale", "FP32", [np.nan]), "guidance_scale: nan is out of range"),
        (("guidance_scale", "FP32", [-1]), "guidance_scale: -1 is out of range, allowed are 0 to"),
        (("seed", "INT64", [-1]), "seed: -1 is out of range, allowed are 0 to 9223372036854775807"),
        (("sampler", "BYTES", [b"magic"]), "sampler: 'magic' does not exist, there are unipc"),
        (("negative_prompt", "BYTES", [b"\xff"]), "negative_prompt: not UTF-8 text: byte 0xff"),
        (("image", "BYTES", [b"no picture"]), "image: 10 bytes that are no readable picture"),
        (("num_images_per_prompt", "INT32", [0]), "num_images_per_prompt: 0 is out of range"),
        (("output_format", "BYTES", [b"bmp"]), "output_format: 'bmp' does not exist"),
        (("eta", "FP32", [0.5]), "eta: only ddim and tcd take it, not unipc"),
        (("timestep_spacing", "BYTES", [b"odd"]), "timestep_spacing: 'odd' does not exist, there"),
        (("guidance_rescale", "FP32", [2]), "guidance_rescale: 2 is out of range.* 0 to 1"),
        (("guidance_start", "FP32", [-1]), "guidance_start: -1 is out of range.* 0 to 1"),
        (("guidance_stop", "FP32", [1.5]), "guidance_stop: 1.5 is out of range.* 0 to 1"),
        (("clip_skip", "INT32", [99]), r"clip_skip: 99 is out of range, allowed are 0 to \d+"),
        (("max_embeddings_multiples", "INT32", [5]), "max_embeddings_multiples: 5 is out.* 1 to 4"),
        (("negative_prompt", "BYTES", [b"(a:99)"]), "negative_prompt: .* -10 to 10"),
        (("lora", "BYTES", [b"a", b"b"]), "lora: 'a' does not exist"),
        # These are Triton's own answers, from the model's config.
        (("seed", "FP32", [1.0]), "'seed' data-type is 'FP32', but .* expects 'INT64'"),
        (
            ("original_size", "INT32", [9]),
            r"unexpected shape for input 'original_size'.* \[2\], got",
        ),
        (("lora", "BYTES", [[b"a"]]), r"unexpected shape for input 'lora'.* \[-1\], got \[1,1\]"),
        (("seed", "INT64", [1, 2]), r"unexpected shape for input 'seed'.* Expected \[1\], got \[2"),
        (("steps", "INT32", [1]), "unexpected inference input 'steps'"),
    ],
)
def test_a_bad_field_is_named_over_grpc(
    server: Server, tensor: tuple[str, str, Any], message: str
) -> None:
    with pytest.raises(InferenceServerException, match=message) as caught:
        ask_grpc(server, PROMPT, tensor)

    assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"


def test_a_missing_prompt_is_refused(server: Server) -> None:
    with pytest.raises(InferenceServerException, match="prompt") as caught:
        ask_grpc(server, ("seed", "INT64", [1]))

    assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"


def test_a_prompt_that_is_not_utf8_is_refused(server: Server) -> None:
    with pytest.raises(InferenceServerException, match="prompt: not UTF-8 text: byte 0xe9"):
        ask_grpc(server, ("prompt", "BYTES", [b"caf\xe9"]))


def test_an_empty_prompt_is_served(client: Client) -> None:
    assert client.generate("", num_inference_steps=2).size


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps: 0 is out of range"),
        ({"width": 100}, "width: 100 is not a multiple of"),
        ({"guidance_scale": -1}, "guidance_scale: -1 is out of range"),
        ({"sampler": "magic"}, "sampler: 'magic' does not exist, there are unipc"),
        ({"image": "no picture"}, "image: 10 bytes that are no readable picture"),
    ],
)
def test_a_bad_field_is_named_over_http_generate(
    server: Server, fields: dict[str, Any], message: str
) -> None:
    status, body = ask_http(server, "generate", {"prompt": "a red circle", **fields})

    assert status == 400
    assert message in body


def test_a_seed_beyond_int64_is_refused_by_tritons_own_parser(server: Server) -> None:
    """Before the model sees it, and with Triton's own status for JSON that it cannot read."""
    status, body = ask_http(server, "generate", {"prompt": "a red circle", "seed": 2**63})

    assert status == 500
    assert "Unable to parse 'data'" in body


def test_the_client_refuses_a_seed_beyond_int64_itself(client: Client) -> None:
    with pytest.raises(InvalidRequest, match="seed: 9223372036854775808 is not a whole int64"):
        client.generate("a red circle", seed=2**63)


def test_a_bad_tensor_is_named_over_http_infer(server: Server) -> None:
    body = {
        "inputs": [
            {"name": "prompt", "shape": [1], "datatype": "BYTES", "data": ["a red circle"]},
            {"name": "num_inference_steps", "shape": [1], "datatype": "INT32", "data": [0]},
        ]
    }
    status, text = ask_http(server, "infer", body)

    assert status == 400
    assert "num_inference_steps: 0 is out of range, allowed are 1 to" in text


def test_the_client_raises_invalid_request(client: Client) -> None:
    with pytest.raises(InvalidRequest, match="num_inference_steps: 0 is out of range"):
        client.generate("a red circle", num_inference_steps=0)


def test_the_http_client_raises_invalid_request(server: Server) -> None:
    with (
        Client(server.http_url) as http,
        pytest.raises(InvalidRequest, match="num_inference_steps: 0 is out of range"),
    ):
        http.generate("a red circle", num_inference_steps=0)


def ask_stream(server: Server, *tensors: tuple[str, str, Any]) -> str:
    """The error that a streamed request ends with."""
    answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
    with tritonclient.grpc.InferenceServerClient(server.grpc_url) as triton:
        triton.start_stream(lambda result, error: answers.put((result, error)))
        triton.async_stream_infer("stable_diffusion_stream", inputs_of(*tensors))
        result, error = answers.get(timeout=60)
    assert result is None
    return str(error)


@pytest.mark.parametrize(
    ("num_bytes", "problem"),
    [
        # What comes through whole is refused for what it is.
        (20 * 2**20, "mask_image: needs a starting picture, image"),
        (65 * 2**20, f"mask_image: {65 * 2**20} bytes is too long, allowed are 0 to {64 * 2**20}"),
    ],
)
def test_megabytes_are_taken_or_refused_over_every_way(
    server: Server, num_bytes: int, problem: str
) -> None:
    """Through shared memory, the stream's socket, and JSON, which Triton keeps on the stack."""
    picture = ("mask_image", "BYTES", [b"A" * num_bytes])

    with pytest.raises(InferenceServerException, match=problem):
        ask_grpc(server, PROMPT, picture)
    assert ask_stream(server, PROMPT, picture) == problem
    body = {"prompt": "a red circle", "mask_image": "A" * num_bytes}
    status, text = ask_http(server, "generate", body)
    assert (status, json.loads(text)) == (400, {"error": problem})
