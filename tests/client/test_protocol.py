"""Fields become typed tensors, and those Triton's messages, or are refused by name."""

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_triton import encode_latents, encode_picture
from tritonclient.utils import deserialize_bytes_tensor, triton_to_np_dtype

from darkroom import InvalidRequest, Latents, Options
from darkroom.protocol import (
    Request,
    cancel_request,
    fields,
    generate_request,
    info_request,
    latents_request,
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


@pytest.mark.parametrize("option", ["steps", "cfg", "prompts", "images"])
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


PICTURE = encode_picture(7)
ADAPTED: Options = {
    "image": PICTURE,
    "mask_image": PICTURE,
    "original_size": (512, 768),
    "crops_coords_top_left": [0, 8],  # type: ignore[typeddict-item]
    "controlnet": ["canny", "depth"],
    "control_image": [PICTURE, PICTURE],
    "controlnet_conditioning_scale": 0.5,
    "control_guidance_end": (0.5, 1),
    "lora": {"ink": 0.75},
}


def test_fields_of_several_values_are_longer_tensors() -> None:
    message = to_grpc(ask(ADAPTED))

    sent = {}
    for entry, raw in zip(message.inputs, message.raw_input_contents, strict=True):
        if entry.datatype == "BYTES":
            values = deserialize_bytes_tensor(raw).tolist()
        else:
            values = np.frombuffer(raw, triton_to_np_dtype(entry.datatype)).tolist()
        assert entry.shape == [len(values)]
        sent[entry.name] = (entry.datatype, values)
    assert len(sent.pop("seed")[1]) == 1
    assert sent == {
        "prompt": ("BYTES", [b"a cat"]),
        "image": ("BYTES", [PICTURE]),
        "mask_image": ("BYTES", [PICTURE]),
        "original_size": ("INT32", [512, 768]),
        "crops_coords_top_left": ("INT32", [0, 8]),
        "controlnet": ("BYTES", [b"canny", b"depth"]),
        "control_image": ("BYTES", [PICTURE, PICTURE]),
        "controlnet_conditioning_scale": ("FP32", [0.5, 0.5]),
        "control_guidance_end": ("FP32", [0.5, 1.0]),
        "lora": ("BYTES", [b"ink"]),
        "lora_scale": ("FP32", [0.75]),
    }


def test_json_has_pictures_as_base64_and_several_values_as_lists() -> None:
    body = json.loads(to_json(ask({"seed": 1, **ADAPTED})))

    encoded = base64.b64encode(PICTURE).decode()
    assert body == {
        "id": "an-id",
        "prompt": "a cat",
        "seed": 1,
        "image": encoded,
        "mask_image": encoded,
        "original_size": [512, 768],
        "crops_coords_top_left": [0, 8],
        "controlnet": ["canny", "depth"],
        "control_image": [encoded, encoded],
        "controlnet_conditioning_scale": [0.5, 0.5],
        "control_guidance_end": [0.5, 1.0],
        "lora": ["ink"],
        "lora_scale": [0.75],
        "output_format": "b64_png",
    }


def test_bytes_that_end_in_zeros_are_sent_whole() -> None:
    latents = Latents.from_bytes(encode_latents(0), 0)
    request = ask({"image": latents})

    assert latents.to_bytes().endswith(b"\0\0\0\0")
    assert request.inputs["image"].tolist() == [latents.to_bytes()]
    raw = to_grpc(request).raw_input_contents[list(request.inputs).index("image")]
    assert deserialize_bytes_tensor(raw).tolist() == [latents.to_bytes()]


def test_pictures_are_read_and_checked_when_the_request_is_made(tmp_path: Path) -> None:
    (tmp_path / "cat.png").write_bytes(PICTURE)

    assert ask({"image": str(tmp_path / "cat.png")}).inputs["image"].tolist() == [PICTURE]
    with pytest.raises(InvalidRequest, match=rf"^mask_image: {tmp_path}/dog.png: No such file"):
        ask({"image": tmp_path / "cat.png", "mask_image": tmp_path / "dog.png"})


def test_a_request_for_latents_asks_for_them() -> None:
    for options in ({}, {"output_format": None}, {"output_format": "latent"}):
        request = latents_request("sd", "a cat", 2, "an-id", {"seed": 1, **options})

        assert {name: array.tolist() for name, array in request.inputs.items()} == {
            "prompt": [b"a cat"],
            "num_images_per_prompt": [2],
            "seed": [1],
            "output_format": [b"latent"],
        }
    with pytest.raises(InvalidRequest, match=r"^output_format: 'png' is for pictures"):
        latents_request("sd", "a cat", None, None, {"output_format": "png"})


def test_pictures_are_not_asked_for_as_latents() -> None:
    with pytest.raises(InvalidRequest, match=r"^output_format: 'latent' .* use generate_latents"):
        ask({"output_format": "latent"})


def test_a_question_about_models_has_no_id_and_names_one_or_none() -> None:
    request = info_request(None)

    assert (request.model, request.request_id, request.inputs) == ("darkroom", "", {})
    assert request.outputs == ("models",)
    assert info_request("sdxl").inputs["model"].tolist() == [b"sdxl"]


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
    with pytest.raises(InvalidRequest, match=rf"^lora_scale: {value} is not a finite number"):
        to_json(ask({"lora": {"ink": 1.0, "wash": float(value)}}))


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
        ({"strength": "0.5"}, "strength: '0.5' is not a number"),
        ({"denoising_end": [0.5]}, r"denoising_end: \[0.5\] is not a number"),
        ({"original_size": 512}, "original_size: 512 is not 2 whole numbers"),
        ({"original_size": (512,)}, r"original_size: \(512,\) is not 2 whole numbers"),
        ({"target_size": (512, 512, 3)}, r"target_size: \(512, 512, 3\) is not 2 whole numbers"),
        ({"target_size": "ab"}, "target_size: 'ab' is not 2 whole numbers"),
        ({"target_size": (512, 0.5)}, "target_size: 0.5 is not a whole int32"),
        ({"crops_coords_top_left": ("0", 0)}, "crops_coords_top_left: '0' is not a whole int32"),
        ({"lora": ["ink", 3]}, "lora: 3 is not a text"),
        ({"lora": {"ink": "much"}}, "lora_scale: 'much' is not a number"),
        ({"lora": "ink", "lora_scale": [None]}, "lora_scale: None is not a number"),
        ({"controlnet": b"canny", "control_image": PICTURE}, "controlnet: b'canny' is not a text"),
        ({"controlnet": "canny"}, "control_image: 0 given"),
        ({"controlnet": "canny", "control_image": b"?"}, "control_image: 1 bytes: not a picture"),
        ({"image": 3}, "image: 3 is not a picture"),
        ({"image": [PICTURE]}, r"image: \[.* is not a picture"),
        ({"mask_image": Latents.from_bytes(encode_latents(1), 1)}, "mask_image: Latents.* is not"),
        ({"variant": 3}, "variant: 3 is not a text"),
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
