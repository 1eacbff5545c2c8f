"""What is asked, as Triton's messages: pure functions that both clients share."""

import base64
import json
import secrets
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from tritonclient.grpc import service_pb2
from tritonclient.utils import np_to_triton_dtype, serialize_byte_tensor

from darkroom import uploads
from darkroom.exceptions import InvalidRequest
from darkroom.options import Options
from darkroom.per_name import as_list, with_lists

MODEL = "stable_diffusion"
STREAM_SUFFIX = "_stream"
CANCEL_SUFFIX = "_cancel"
INFO_MODEL = "darkroom"
"""Tells of all models of a server."""
OUTPUTS = ("image", "seed", "info")
CANCEL_OUTPUTS = ("cancelled",)
INFO_OUTPUTS = ("models",)
LATENT = "latent"
"""The output format that is no picture's."""

_INPUTS: dict[str, tuple[str, Any]] = {
    "prompt": ("BYTES", np.object_),
    "negative_prompt": ("BYTES", np.object_),
    "num_inference_steps": ("INT32", np.int32),
    "guidance_scale": ("FP32", np.float32),
    "guidance_rescale": ("FP32", np.float32),
    "guidance_start": ("FP32", np.float32),
    "guidance_stop": ("FP32", np.float32),
    "seed": ("INT64", np.int64),
    "width": ("INT32", np.int32),
    "height": ("INT32", np.int32),
    "sampler": ("BYTES", np.object_),
    "eta": ("FP32", np.float32),
    "timestep_spacing": ("BYTES", np.object_),
    "clip_skip": ("INT32", np.int32),
    "max_embeddings_multiples": ("INT32", np.int32),
    "num_images_per_prompt": ("INT32", np.int32),
    "image": ("BYTES", np.object_),
    "mask_image": ("BYTES", np.object_),
    "strength": ("FP32", np.float32),
    "denoising_start": ("FP32", np.float32),
    "denoising_end": ("FP32", np.float32),
    "original_size": ("INT32", np.int32),
    "crops_coords_top_left": ("INT32", np.int32),
    "target_size": ("INT32", np.int32),
    "aesthetic_score": ("FP32", np.float32),
    "negative_aesthetic_score": ("FP32", np.float32),
    "controlnet": ("BYTES", np.object_),
    "control_image": ("BYTES", np.object_),
    "controlnet_conditioning_scale": ("FP32", np.float32),
    "control_guidance_start": ("FP32", np.float32),
    "control_guidance_end": ("FP32", np.float32),
    "lora": ("BYTES", np.object_),
    "lora_scale": ("FP32", np.float32),
    "variant": ("BYTES", np.object_),
    "priority": ("INT32", np.int32),
    "timeout_ms": ("INT32", np.int32),
    "output_format": ("BYTES", np.object_),
}
_STREAM_INPUTS = {**_INPUTS, "preview_interval": ("INT32", np.int32)}
_CANCEL_INPUTS = {"request_id": ("BYTES", np.object_)}
_INFO_INPUTS = {"model": ("BYTES", np.object_)}
_DIMS = {
    "original_size": 2,
    "crops_coords_top_left": 2,
    "target_size": 2,
    "controlnet": -1,
    "control_image": -1,
    "controlnet_conditioning_scale": -1,
    "control_guidance_start": -1,
    "control_guidance_end": -1,
    "lora": -1,
    "lora_scale": -1,
}
"""How many values an input has, -1 for any number, where that is not one."""
_PICTURE_MODES = {"image": "RGB", "mask_image": "L", "control_image": "RGB"}
"""The inputs that are pictures, and as what PIL images travel."""
FIELDS = frozenset({*_STREAM_INPUTS, *_CANCEL_INPUTS, *_INFO_INPUTS})
"""What the server's message begins with if a field is wrong."""


@dataclass(frozen=True)
class Request:
    """What a Triton model is sent."""

    model: str
    request_id: str
    """Triton's id of the request, by which it can be cancelled; empty for none."""
    inputs: dict[str, np.ndarray[Any, Any]]
    """Each of its input's type and of one dimension; texts are objects, as UTF-8."""
    outputs: tuple[str, ...] = ()
    """Empty for all."""


def generate_request(
    model: str,
    prompt: str,
    num_images_per_prompt: int | None,
    request_id: str | None,
    options: Options,
) -> Request:
    """The request for pictures.

    Raises:
        TypeError: there is no such option.
        InvalidRequest: a value does not fit the type of its field.
    """
    chosen = fields(prompt, num_images_per_prompt, options)
    chosen_id = uuid.uuid4().hex if request_id is None else _checked_id(request_id)
    return Request(model, chosen_id, _arrays(chosen, _INPUTS), OUTPUTS)


def latents_request(
    model: str,
    prompt: str,
    num_images_per_prompt: int | None,
    request_id: str | None,
    options: Options,
) -> Request:
    """The request for latents; raises as `generate_request` does."""
    chosen: Options = {**options}
    output_format = chosen.pop("output_format", None)
    if output_format not in (None, LATENT):
        raise InvalidRequest(f"output_format: {output_format!r} is for pictures, leave it out")
    request = generate_request(model, prompt, num_images_per_prompt, request_id, chosen)
    inputs = {**request.inputs, **_arrays({"output_format": LATENT}, _INPUTS)}
    return replace(request, inputs=inputs)


def stream_request(request: Request, preview_interval: int | None) -> Request:
    """The request for the events of `request`, and for a preview every so many steps.

    Raises:
        InvalidRequest: the interval is no whole number.
    """
    chosen = {} if preview_interval is None else {"preview_interval": preview_interval}
    inputs = {**request.inputs, **_arrays(chosen, _STREAM_INPUTS)}
    return replace(request, model=request.model + STREAM_SUFFIX, inputs=inputs, outputs=())


def cancel_request(model: str, request_id: str) -> Request:
    """The request to cancel another one.

    Raises:
        InvalidRequest: the id is no text, or empty.
    """
    inputs = _arrays({"request_id": _checked_id(request_id)}, _CANCEL_INPUTS)
    return Request(model + CANCEL_SUFFIX, "", inputs, CANCEL_OUTPUTS)


def info_request(model: str | None) -> Request:
    """The request to tell of a model, or of all.

    Raises:
        InvalidRequest: the model's name is no text.
    """
    chosen = {} if model is None else {"model": model}
    return Request(INFO_MODEL, "", _arrays(chosen, _INFO_INPUTS), INFO_OUTPUTS)


def fields(prompt: str, num_images_per_prompt: int | None, options: Options) -> dict[str, Any]:
    """The fields of a request, without those left out; the seed is chosen here if it was not.

    A request that carries its seed makes the same picture when it is sent again, be it by a retry
    or out of the server's response cache.

    Raises:
        TypeError: there is no such option.
        InvalidRequest: an output format that is not a picture's, or lists that do not fit.
    """
    unknown = sorted(set(options) - set(_INPUTS))
    if unknown:
        raise TypeError(f"{unknown[0]!r} is not an option, there are {', '.join(_INPUTS)}")
    if options.get("output_format") == "b64_png":
        raise InvalidRequest("output_format: 'b64_png' is for JSON endpoints, use png")
    if options.get("output_format") == LATENT:
        raise InvalidRequest("output_format: 'latent' is no picture, use generate_latents")
    given = {"num_images_per_prompt": num_images_per_prompt, **options}
    chosen = {name: value for name, value in given.items() if value is not None}
    chosen.setdefault("seed", secrets.randbits(32))
    return {"prompt": prompt, **with_lists(chosen)}


def to_grpc(request: Request) -> Any:
    """The `ModelInferRequest`."""
    message = service_pb2.ModelInferRequest(model_name=request.model, id=request.request_id)
    for name, array in request.inputs.items():
        datatype = np_to_triton_dtype(array.dtype)
        raw = serialize_byte_tensor(array).item() if datatype == "BYTES" else array.tobytes()
        message.inputs.add(name=name, datatype=datatype, shape=array.shape)
        message.raw_input_contents.append(raw)
    for name in request.outputs:
        message.outputs.add(name=name)
    return message


def to_json(request: Request) -> bytes:
    """The body for Triton's generate endpoints, where pictures are base64 text, both ways.

    Raises:
        InvalidRequest: a picture of another format than PNG, or a number that JSON has not.
    """
    body = {name: _json_value(name, array) for name, array in request.inputs.items()}
    output_format = body.get("output_format", "png")
    if output_format != "png":
        raise InvalidRequest(f"output_format: {output_format!r} is not for HTTP streams, use png")
    return json.dumps({"id": request.request_id, **body, "output_format": "b64_png"}).encode()


def _json_value(name: str, array: np.ndarray[Any, Any]) -> Any:
    values = array.tolist()
    for value in values:
        if isinstance(value, float) and not np.isfinite(value):
            raise InvalidRequest(f"{name}: {value} is not a finite number")
    if name in _PICTURE_MODES:
        values = [base64.b64encode(value) for value in values]
    values = [value.decode() if isinstance(value, bytes) else value for value in values]
    return values if name in _DIMS else values[0]


def _checked_id(request_id: str) -> str:
    if not isinstance(request_id, str) or not request_id:
        raise InvalidRequest(f"request_id: {request_id!r} is not a text of one character or more")
    _text("request_id", request_id)
    return request_id


def _arrays(
    chosen: Mapping[str, Any], inputs: Mapping[str, tuple[str, Any]]
) -> dict[str, np.ndarray[Any, Any]]:
    return {name: _array(name, value, inputs[name][1]) for name, value in chosen.items()}


def _array(name: str, value: Any, dtype: Any) -> np.ndarray[Any, Any]:
    num_values = _DIMS.get(name, 1)
    values = [value] if num_values == 1 else as_list(value)
    if num_values > 1 and len(values) != num_values:
        raise InvalidRequest(f"{name}: {value!r} is not {num_values} whole numbers")
    if name in _PICTURE_MODES:
        mode = _PICTURE_MODES[name]
        return np.array([uploads.encode(name, it, mode) for it in values], np.object_)
    if dtype is np.object_:
        return np.array([_text(name, it) for it in values], np.object_)
    return np.array([_number(name, it, dtype) for it in values], dtype)


def _text(name: str, value: Any) -> bytes:
    try:
        if isinstance(value, str):
            return value.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        pass
    raise InvalidRequest(f"{name}: {value!r} is not a text")


def _number(name: str, value: Any, dtype: Any) -> Any:
    is_whole = np.issubdtype(dtype, np.integer)
    try:
        number = int(value) if is_whole else float(value)
        # What numpy would round, wrap around or read out of a text is not what was asked for.
        fits = not isinstance(value, str) and (not is_whole or number == value)
        with np.errstate(over="raise"):
            array = np.array([number], np.int64 if is_whole else np.float64).astype(dtype)
        fits = fits and (not is_whole or array[0] == number)
    except (TypeError, ValueError, OverflowError, FloatingPointError):
        fits = False
    if not fits:
        expected = f"a whole {dtype.__name__}" if is_whole else "a number"
        raise InvalidRequest(f"{name}: {value!r} is not {expected}")
    return array[0]
