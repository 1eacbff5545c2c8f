"""Fields become typed tensors or are refused by name; answers become pictures or a ServerError."""

import json
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
from fake_triton import INFO, encode_picture, paint
from tritonclient.grpc import service_pb2
from tritonclient.utils import deserialize_bytes_tensor, triton_to_np_dtype

from darkroom import InvalidRequest, ServerError
from darkroom.protocol import build_inputs, build_outputs, fields, parse


def test_what_is_left_out_is_not_sent() -> None:
    assert fields("a cat", None, {"seed": 1}) == {"prompt": "a cat", "seed": 1}


def test_none_is_left_out() -> None:
    options = {"seed": 1, "width": None, "negative_prompt": None}

    assert fields("a cat", None, options) == {"prompt": "a cat", "seed": 1}


def test_zero_and_the_empty_text_are_sent() -> None:
    sent = fields("", None, {"seed": 0, "guidance_scale": 0.0, "negative_prompt": ""})

    assert sent == {"prompt": "", "seed": 0, "guidance_scale": 0.0, "negative_prompt": ""}


def test_a_seed_is_chosen_where_none_is_given() -> None:
    seeds = {fields("a cat", None, {})["seed"] for _ in range(8)}

    assert len(seeds) > 1
    assert all(0 <= seed < 2**32 for seed in seeds)


def test_the_number_of_pictures_is_sent_if_given() -> None:
    assert fields("a cat", 3, {"seed": 1})["num_images_per_prompt"] == 3


@pytest.mark.parametrize("option", ["steps", "cfg", "prompts", "image"])
def test_an_unknown_option_is_a_type_error_that_lists_the_options(option: str) -> None:
    with pytest.raises(TypeError, match=f"'{option}' is not an option, there are .*guidance_scale"):
        fields("a cat", None, {option: 1})


def test_inputs_have_the_servers_types() -> None:
    options = {"negative_prompt": "ein Bär ☃", "seed": 2**63 - 1, "guidance_scale": 7.5, "width": 8}
    tensors = build_inputs(tritonclient.grpc, fields("a cat", 2, options))

    sent = {}
    for tensor in tensors:
        assert tensor.shape() == [1]
        raw = tensor._get_content()
        if tensor.datatype() == "BYTES":
            sent[tensor.name()] = deserialize_bytes_tensor(raw)[0]
        else:
            sent[tensor.name()] = np.frombuffer(raw, triton_to_np_dtype(tensor.datatype()))[0]
    assert sent == {
        "prompt": b"a cat",
        "negative_prompt": "ein Bär ☃".encode(),
        "seed": np.int64(2**63 - 1),
        "guidance_scale": np.float32(7.5),
        "width": np.int32(8),
        "num_images_per_prompt": np.int32(2),
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 2.5}, "seed: 2.5 is not a whole int64"),
        ({"seed": "12"}, "seed: '12' is not a whole int64"),
        ({"seed": 2**63}, "seed: 9223372036854775808 is not a whole int64"),
        ({"seed": -(2**63) - 1}, "seed: -9223372036854775809 is not a whole int64"),
        ({"seed": 2.0**63}, r"seed: 9\.22.*e\+18 is not a whole int64"),
        ({"seed": 1j}, "seed: 1j is not a whole int64"),
        ({"seed": [1]}, r"seed: \[1\] is not a whole int64"),
        ({"seed": [1, 2]}, r"seed: \[1, 2\] is not a whole int64"),
        ({"width": 2**31}, "width: 2147483648 is not a whole int32"),
        ({"width": -(2**31) - 1}, "width: -2147483649 is not a whole int32"),
        ({"width": float("nan")}, "width: nan is not a whole int32"),
        ({"width": float("inf")}, "width: inf is not a whole int32"),
        ({"height": "tall"}, "height: 'tall' is not a whole int32"),
        ({"guidance_scale": "strong"}, "guidance_scale: 'strong' is not a number"),
        ({"guidance_scale": "7.5"}, "guidance_scale: '7.5' is not a number"),
        ({"guidance_scale": [7.5, 1.0]}, r"guidance_scale: \[7.5, 1.0\] is not a number"),
        ({"guidance_scale": {}}, "guidance_scale: {} is not a number"),
        ({"guidance_scale": 1e39}, r"guidance_scale: 1e\+39 is not a number"),
        ({"guidance_scale": 10**400}, "guidance_scale: 10+ is not a number"),
        ({"sampler": 3}, "sampler: 3 is not a text"),
        ({"negative_prompt": b"a cat"}, "negative_prompt: b'a cat' is not a text"),
        ({"negative_prompt": "\ud800"}, r"negative_prompt: '\\ud800' is not a text"),
    ],
)
def test_a_value_that_does_not_fit_its_field_is_refused(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidRequest, match=f"^{message}"):
        build_inputs(tritonclient.grpc, fields("a cat", None, options))


@pytest.mark.parametrize("prompt", [None, 7, b"a cat", ["a cat"]])
def test_a_prompt_that_is_no_text_is_refused(prompt: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"^prompt: .* is not a text"):
        build_inputs(tritonclient.grpc, fields(prompt, None, {}))


@pytest.mark.parametrize("count", [1.5, "two", 2**40])
def test_a_number_of_pictures_that_is_none_is_refused(count: Any) -> None:
    with pytest.raises(InvalidRequest, match=f"^num_images_per_prompt: {count!r} is not a whole"):
        build_inputs(tritonclient.grpc, fields("a cat", count, {}))


def test_numbers_of_numpy_and_whole_floats_are_taken() -> None:
    options = {"seed": np.int64(5), "width": 64.0, "guidance_scale": np.float64(2)}
    by_name = {
        tensor.name(): tensor
        for tensor in build_inputs(tritonclient.grpc, fields("a cat", None, options))
    }

    assert np.frombuffer(by_name["seed"]._get_content(), np.int64) == 5
    assert np.frombuffer(by_name["width"]._get_content(), np.int32) == 64
    assert np.frombuffer(by_name["guidance_scale"]._get_content(), np.float32) == 2


def test_the_three_outputs_are_asked_for() -> None:
    names = [output.name() for output in build_outputs(tritonclient.grpc)]

    assert names == ["image", "seed", "info"]


class Result:
    """An `InferResult`, as far as `parse` looks."""

    def __init__(self, **arrays: Any) -> None:
        self._arrays = {**paint({"seed": 1}), **arrays}

    def as_numpy(self, name: str) -> Any:
        return self._arrays[name]


def texts(*values: bytes) -> np.ndarray:
    return np.array(values, np.object_)


def test_an_answer_becomes_pictures_in_order() -> None:
    pictures = parse(Result(**paint({"seed": 7, "num_images_per_prompt": 3})))

    assert [picture.seed for picture in pictures] == [7, 8, 9]
    assert [picture.getpixel((0, 0)) for picture in pictures] == [
        (7, 20, 30),
        (8, 20, 30),
        (9, 20, 30),
    ]


def without(key: str) -> np.ndarray:
    facts = {name: fact for name, fact in INFO.items() if name != key}
    return texts(json.dumps(facts).encode())


@pytest.mark.parametrize(
    "arrays",
    [
        {"image": None},
        {"seed": None},
        {"info": None},
        {"info": texts()},
        {"info": texts(b"no JSON")},
        {"info": texts(b"\xff")},
        {"info": texts(b"[]")},
        {"info": texts(b"3")},
        {"info": without("timings")},
        {"info": without("model")},
        {"info": without("notes")},
        {"seed": np.array([1, 2])},
        {"seed": texts(b"one")},
        {"image": texts(), "seed": np.array([], np.int64)},
        {"image": texts(b"")},
        {"image": texts(b"no picture")},
        {"image": texts(encode_picture(1)[:50])},
        {"image": np.array([1.5], np.float32)},
        {"image": np.array([[encode_picture(1)]], np.object_)},
    ],
    ids=lambda arrays: ", ".join(f"{name} {str(array)[:20]}" for name, array in arrays.items()),
)
def test_a_malformed_answer_is_a_server_error(arrays: dict[str, Any]) -> None:
    with pytest.raises(ServerError, match="the server's answer cannot be read: "):
        parse(Result(**arrays))


def test_an_answer_whose_bytes_are_cut_is_a_server_error() -> None:
    response = service_pb2.ModelInferResponse()
    for name in ("image", "seed", "info"):
        response.outputs.add(name=name, datatype="BYTES", shape=[1])
        response.raw_output_contents.append(b"\xff\0\0\0short")

    with pytest.raises(ServerError, match="the server's answer cannot be read: "):
        parse(tritonclient.grpc.InferResult(response))
