"""What is asked, as Triton's messages: pure functions that both clients share."""

import json
import secrets
import uuid
from dataclasses import dataclass, replace
from typing import Any, TypedDict

import numpy as np
from tritonclient.grpc import service_pb2
from tritonclient.utils import np_to_triton_dtype, serialize_byte_tensor

from darkroom.exceptions import InvalidRequest

MODEL = "stable_diffusion"
STREAM_SUFFIX = "_stream"
CANCEL_SUFFIX = "_cancel"
OUTPUTS = ("image", "seed", "info")
CANCEL_OUTPUTS = ("cancelled",)

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
    "priority": ("INT32", np.int32),
    "timeout_ms": ("INT32", np.int32),
    "output_format": ("BYTES", np.object_),
}
_STREAM_INPUTS = {**_INPUTS, "preview_interval": ("INT32", np.int32)}
_CANCEL_INPUTS = {"request_id": ("BYTES", np.object_)}
FIELDS = frozenset({*_STREAM_INPUTS, *_CANCEL_INPUTS, "image", "mask_image", "strength"})
"""What the server's message begins with if a field is wrong."""


class Options(TypedDict, total=False):
    """The optional parameters of a request; names and meanings are diffusers'."""

    negative_prompt: str | None
    num_inference_steps: int | None
    guidance_scale: float | None
    """Above 1, classifier-free guidance is on, and the picture takes twice the work."""
    guidance_rescale: float | None
    """0 to 1: how far the guided prediction is brought back to the contrast of the unguided one."""
    guidance_start: float | None
    """0 to 1: the share of the steps that run unguided before guidance begins; 0 if left out."""
    guidance_stop: float | None
    """0 to 1: the share of the steps after which guidance ends; 1 if left out.

    Steps without guidance take half the work.
    """
    seed: int | None
    """0 to 2**63 - 1; left out, the client chooses one, and the picture tells which."""
    width: int | None
    """Pixels."""
    height: int | None
    """Pixels."""
    sampler: str | None
    eta: float | None
    """0 to 1: how much fresh noise each step adds, for the samplers "ddim" and "tcd"."""
    timestep_spacing: str | None
    """"linspace", "leading" or "trailing": which of the checkpoint's noise levels are used."""
    clip_skip: int | None
    """How many of the text encoder's last layers are passed over; 0 if left out."""
    max_embeddings_multiples: int | None
    """1 to 4: how many times 77 tokens of the prompt are read; 1 if left out."""
    priority: int | None
    """-10 to 10, larger goes first."""
    timeout_ms: int | None
    """After this time the server gives up on the request."""
    output_format: str | None
    """"png", "jpeg" or "webp", as which the picture travels."""


@dataclass(frozen=True)
class Request:
    """What a Triton model is sent."""

    model: str
    request_id: str
    """Triton's id of the request, by which it can be cancelled; empty for none."""
    inputs: dict[str, np.ndarray[Any, Any]]
    """Each of shape [1] and of its input's type; texts are objects, as UTF-8."""
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


def fields(prompt: str, num_images_per_prompt: int | None, options: Options) -> dict[str, Any]:
    """The fields of a request, without those left out; the seed is chosen here if it was not.

    A request that carries its seed makes the same picture when it is sent again, be it by a retry
    or out of the server's response cache.

    Raises:
        TypeError: there is no such option.
        InvalidRequest: an output format that is not a picture's.
    """
    unknown = sorted(set(options) - set(_INPUTS))
    if unknown:
        raise TypeError(f"{unknown[0]!r} is not an option, there are {', '.join(_INPUTS)}")
    if options.get("output_format") == "b64_png":
        raise InvalidRequest("output_format: 'b64_png' is for JSON endpoints, use png")
    given = {"num_images_per_prompt": num_images_per_prompt, **options}
    chosen = {name: value for name, value in given.items() if value is not None}
    chosen.setdefault("seed", secrets.randbits(32))
    return {"prompt": prompt, **chosen}


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
    """The body for Triton's generate endpoints, which take pictures as base64 text alone.

    Raises:
        InvalidRequest: a picture of another format than PNG, or a number that JSON has not.
    """
    values = {name: array.item() for name, array in request.inputs.items()}
    body = {
        name: value.decode() if isinstance(value, bytes) else value
        for name, value in values.items()
    }
    output_format = body.get("output_format", "png")
    if output_format != "png":
        raise InvalidRequest(f"output_format: {output_format!r} is not for HTTP streams, use png")
    for name, value in body.items():
        if isinstance(value, float) and not np.isfinite(value):
            raise InvalidRequest(f"{name}: {value} is not a finite number")
    return json.dumps({"id": request.request_id, **body, "output_format": "b64_png"}).encode()


def _checked_id(request_id: str) -> str:
    if not isinstance(request_id, str) or not request_id:
        raise InvalidRequest(f"request_id: {request_id!r} is not a text of one character or more")
    _array("request_id", request_id, np.object_)
    return request_id


def _arrays(
    chosen: dict[str, Any], inputs: dict[str, tuple[str, Any]]
) -> dict[str, np.ndarray[Any, Any]]:
    return {name: _array(name, value, inputs[name][1]) for name, value in chosen.items()}


def _array(name: str, value: Any, dtype: Any) -> np.ndarray[Any, Any]:
    if dtype is np.object_:
        if not isinstance(value, str):
            raise InvalidRequest(f"{name}: {value!r} is not a text")
        try:
            return np.array([value.encode()], np.object_)
        except UnicodeEncodeError:  # half of a surrogate pair
            raise InvalidRequest(f"{name}: {value!r} is not a text") from None
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
    return array
