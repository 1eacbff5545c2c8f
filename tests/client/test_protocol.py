"""Fields become typed tensors, and those Triton's messages, or are refused by name."""

import json
from typing import Any

import numpy as np
import pytest
from tritonclient.utils import deserialize_bytes_tensor, triton_to_np_dtype

from darkroom import InvalidRequest, Options
from darkroom.protocol import (
    Request,
    cancel_request,
    fields,
    generate_request,
    stream_request,
    to_grpc,
    to_json,
)


def ask(options: Options, prompt: Any = "a cat", count: Any = None) -> Request:
    return generate_request("sd", prompt, count, "an-id", options)


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
    options: Options = {
        "negative_prompt": "ein Bär ☃",
        "seed": 2**63 - 1,
        "guidance_scale": 7.5,
        "width": 8,
        "eta": 1,
        "timestep_spacing": "trailing",
        "clip_skip": 1,
    }
    message = to_grpc(ask(options, count=2))

    sent = {}
    for entry, raw in zip(message.inputs, message.raw_input_contents, strict=True):
        assert entry.shape == [1]
        if entry.datatype == "BYTES":
            sent[entry.name] = deserialize_bytes_tensor(raw)[0]
        else:
            sent[entry.name] = np.frombuffer(raw, triton_to_np_dtype(entry.datatype))[0]
    assert sent == {
        "prompt": b"a cat",
        "negative_prompt": "ein Bär ☃".encode(),
        "seed": np.int64(2**63 - 1),
        "guidance_scale": np.float32(7.5),
        "width": np.int32(8),
        "eta": np.float32(1),
        "timestep_spacing": b"trailing",
        "clip_skip": np.int32(1),
        "num_images_per_prompt": np.int32(2),
    }


def test_a_message_names_model_id_and_outputs() -> None:
    message = to_grpc(ask({}))

    assert (message.model_name, message.id) == ("sd", "an-id")
    assert [output.name for output in message.outputs] == ["image", "seed", "info"]


def test_an_id_is_chosen_where_none_is_given() -> None:
    ids = {generate_request("sd", "a cat", None, None, {}).request_id for _ in range(8)}

    assert len(ids) == 8
    assert all(len(request_id) == 32 and int(request_id, 16) for request_id in ids)


@pytest.mark.parametrize("request_id", ["", 7, b"an-id", "\ud800"])
def test_an_id_that_is_no_text_is_refused(request_id: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"^request_id: .* is not a text"):
        generate_request("sd", "a cat", None, request_id, {})
    with pytest.raises(InvalidRequest, match=r"^request_id: .* is not a text"):
        cancel_request("sd", request_id)


def test_a_stream_is_the_same_request_to_another_model() -> None:
    request = ask({"seed": 1})
    streamed = stream_request(request, None)

    assert (streamed.model, streamed.request_id) == ("sd_stream", "an-id")
    assert streamed.inputs == request.inputs
    assert streamed.outputs == ()


def test_a_stream_may_have_previews() -> None:
    streamed = stream_request(ask({}), 5)

    assert streamed.inputs["preview_interval"].dtype == np.int32
    assert streamed.inputs["preview_interval"].tolist() == [5]
    with pytest.raises(InvalidRequest, match=r"^preview_interval: 2.5 is not a whole int32"):
        stream_request(ask({}), 2.5)  # type: ignore[arg-type]


def test_a_cancel_names_the_request_and_has_no_id_of_its_own() -> None:
    request = cancel_request("sd", "an-id")

    assert (request.model, request.request_id) == ("sd_cancel", "")
    assert request.inputs["request_id"].tolist() == [b"an-id"]
    assert request.outputs == ("cancelled",)


def test_json_has_the_values_and_asks_for_base64() -> None:
    options: Options = {"negative_prompt": "ein Bär ☃", "seed": 2**63 - 1, "guidance_scale": 7.5}
    body = json.loads(to_json(stream_request(ask(options), 5)))

    assert body == {
        "id": "an-id",
        "prompt": "a cat",
        "negative_prompt": "ein Bär ☃",
        "seed": 2**63 - 1,
        "guidance_scale": 7.5,
        "preview_interval": 5,
        "output_format": "b64_png",
    }


def test_json_has_whole_numbers_of_real_fields_with_a_point() -> None:
    assert b'"guidance_scale": 5.0' in to_json(ask({"guidance_scale": 5}))


def test_only_pngs_travel_as_json() -> None:
    assert json.loads(to_json(ask({"output_format": "png"})))["output_format"] == "b64_png"
    with pytest.raises(InvalidRequest, match=r"^output_format: 'webp' is not for HTTP streams"):
        to_json(ask({"output_format": "webp"}))


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_what_json_has_no_number_for_is_refused(value: str) -> None:
    with pytest.raises(InvalidRequest, match=rf"^guidance_scale: {value} is not a finite number"):
        to_json(ask({"guidance_scale": float(value)}))


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
        ({"clip_skip": 0.5}, "clip_skip: 0.5 is not a whole int32"),
        ({"max_embeddings_multiples": "3"}, "max_embeddings_multiples: '3' is not a whole int32"),
        ({"eta": "much"}, "eta: 'much' is not a number"),
        ({"guidance_rescale": None, "guidance_start": "0"}, "guidance_start: '0' is not a number"),
        ({"timestep_spacing": 1}, "timestep_spacing: 1 is not a text"),
        ({"sampler": 3}, "sampler: 3 is not a text"),
        ({"negative_prompt": b"a cat"}, "negative_prompt: b'a cat' is not a text"),
        ({"negative_prompt": "\ud800"}, r"negative_prompt: '\\ud800' is not a text"),
    ],
)
def test_a_value_that_does_not_fit_its_field_is_refused(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidRequest, match=f"^{message}"):
        ask(options)


@pytest.mark.parametrize("prompt", [None, 7, b"a cat", ["a cat"]])
def test_a_prompt_that_is_no_text_is_refused(prompt: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"^prompt: .* is not a text"):
        ask({}, prompt=prompt)


@pytest.mark.parametrize("count", [1.5, "two", 2**40])
def test_a_number_of_pictures_that_is_none_is_refused(count: Any) -> None:
    with pytest.raises(InvalidRequest, match=f"^num_images_per_prompt: {count!r} is not a whole"):
        ask({}, count=count)


def test_numbers_of_numpy_and_whole_floats_are_taken() -> None:
    options = {"seed": np.int64(5), "width": 64.0, "guidance_scale": np.float64(2)}
    inputs = ask(options).inputs

    assert inputs["seed"].tolist() == [5]
    assert inputs["width"].tolist() == [64]
    assert inputs["guidance_scale"].tolist() == [2.0]
