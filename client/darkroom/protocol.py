"""Requests to Triton tensors and tensors to pictures: pure functions that both clients share."""

import json
import secrets
import struct
from types import ModuleType
from typing import Any, TypedDict

import numpy as np

from darkroom.exceptions import InvalidRequest, ServerError
from darkroom.picture import Picture

MODEL = "stable_diffusion"
OUTPUTS = ("image", "seed", "info")

_INPUTS: dict[str, tuple[str, Any]] = {
    "prompt": ("BYTES", np.object_),
    "negative_prompt": ("BYTES", np.object_),
    "num_inference_steps": ("INT32", np.int32),
    "guidance_scale": ("FP32", np.float32),
    "seed": ("INT64", np.int64),
    "width": ("INT32", np.int32),
    "height": ("INT32", np.int32),
    "sampler": ("BYTES", np.object_),
    "num_images_per_prompt": ("INT32", np.int32),
    "priority": ("INT32", np.int32),
    "timeout_ms": ("INT32", np.int32),
    "output_format": ("BYTES", np.object_),
}


class Options(TypedDict, total=False):
    """The optional parameters of a request; names and meanings are diffusers'."""

    negative_prompt: str | None
    num_inference_steps: int | None
    guidance_scale: float | None
    """Above 1, classifier-free guidance is on, and the picture takes twice the work."""
    seed: int | None
    """0 to 2**63 - 1; left out, the client chooses one, and the picture tells which."""
    width: int | None
    """Pixels."""
    height: int | None
    """Pixels."""
    sampler: str | None
    priority: int | None
    """-10 to 10, larger goes first."""
    timeout_ms: int | None
    """After this time the server gives up on the request."""
    output_format: str | None
    """"png", "jpeg" or "webp", as which the picture travels."""


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


def build_inputs(triton: ModuleType, fields: dict[str, Any]) -> list[Any]:
    """The fields as `InferInput`s of `triton`, which is tritonclient.grpc or tritonclient.http.

    Raises:
        InvalidRequest: a value does not fit the type of its field.
    """
    inputs = []
    for name, value in fields.items():
        datatype, dtype = _INPUTS[name]
        tensor = triton.InferInput(name, [1], datatype)
        tensor.set_data_from_numpy(_array(name, value, dtype))
        inputs.append(tensor)
    return inputs


def build_outputs(triton: ModuleType) -> list[Any]:
    return [triton.InferRequestedOutput(name) for name in OUTPUTS]


def parse(result: Any) -> list[Picture]:
    """The pictures of an `InferResult`.

    Raises:
        ServerError: the answer is not one of a Darkroom server.
    """
    try:
        encoded = result.as_numpy("image")
        seeds = result.as_numpy("seed")
        info = json.loads(result.as_numpy("info")[0])
        pictures = [
            Picture.from_bytes(data, int(seed), info)
            for data, seed in zip(encoded, seeds, strict=True)
        ]
        if not pictures:
            raise ValueError("no picture")
    except (TypeError, ValueError, LookupError, OSError, struct.error) as error:
        raise ServerError(f"the server's answer cannot be read: {error!r}") from error
    return pictures


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
