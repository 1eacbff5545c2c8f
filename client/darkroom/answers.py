"""Triton's answers as pictures, events and errors: pure functions that both clients share."""

import base64
import json
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image
from tritonclient.grpc import InferResult

from darkroom.events import Done, Event, Preview, Queued, Step
from darkroom.exceptions import DarkroomError, ServerError, from_message, from_status
from darkroom.latents import Latents
from darkroom.model_info import ModelInfo
from darkroom.picture import Picture
from darkroom.protocol import FIELDS

ENDED_EARLY = "the stream ended before the pictures came"
CLOSED = "closed before the pictures came"
_ENCODED = ("image", "preview")
"""The outputs that are base64 text in JSON."""
_CHECKED = "nsfw_content_detected"


def from_grpc(message: Any) -> InferResult:
    """The result in a `ModelStreamInferResponse`.

    Raises:
        DarkroomError: the message is an error.
    """
    if message.error_message:
        raise from_message(message.error_message, FIELDS)
    return InferResult(message.infer_response)


def server_sent_events(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The data of each event in the body of a text/event-stream answer.

    An event that the end cuts off is none.
    """
    data: list[bytes] = []
    line: list[bytes] = []
    for chunk in chunks:
        part, *parts = chunk.split(b"\n")
        line.append(part)
        for part in parts:
            text = b"".join(line).removesuffix(b"\r")
            line = [part]
            if text.startswith(b"data:"):
                data.append(text.removeprefix(b"data:"))
            elif not text and data:
                yield b"\n".join(data)
                data = []


class JsonResult:
    """An answer of Triton's generate endpoints, read as an `InferResult` is."""

    def __init__(self, answer: dict[str, Any]) -> None:
        self._answer = answer

    def as_numpy(self, name: str) -> np.ndarray[Any, Any] | None:
        """The output as an array of objects, or None if there is none."""
        value = self._answer.get(name)
        if value is None:
            return None
        values = value if isinstance(value, list) else [value]
        if name in _ENCODED:
            values = [base64.b64decode(text, validate=True) for text in values]
        return np.array(values, np.object_)


def from_json(text: bytes) -> JsonResult:
    """The result in the data of a server-sent event.

    Raises:
        DarkroomError: the data is an error, or cannot be read.
    """
    with _reading():
        answer = json.loads(text)
        if not isinstance(answer, dict):
            raise TypeError("not an object")
    if "error" in answer:
        raise from_message(str(answer["error"]), FIELDS)
    return JsonResult(answer)


def http_error(status: int, body: bytes) -> DarkroomError:
    """The error for an HTTP answer that no model has given."""
    try:
        message = str(json.loads(body)["error"])
    except (ValueError, TypeError, LookupError):
        message = f"HTTP {status}: {body[:200].decode(errors='replace')}"
    return from_status(str(status), message)


def parse(result: Any) -> list[Picture]:
    """The pictures of an `InferResult`.

    Raises:
        ServerError: the answer is not one of a Darkroom server.
    """
    with _reading():
        return [Picture.from_bytes(*made) for made in _made(result)]


def parse_latents(result: Any) -> list[Latents]:
    """The latents of an `InferResult`.

    Raises:
        ServerError: the answer is not one of a Darkroom server.
    """
    with _reading():
        return [Latents.from_bytes(*made) for made in _made(result)]


def parse_models(result: Any) -> list[ModelInfo]:
    """The models of an `InferResult`.

    Raises:
        ServerError: the answer is not one of a Darkroom server.
    """
    with _reading():
        models = json.loads(result.as_numpy("models")[0])
        if not isinstance(models, list) or not all(isinstance(it, dict) for it in models):
            raise TypeError("no list of models")
        return [ModelInfo.from_raw(raw) for raw in models]


def parse_model(result: Any) -> ModelInfo:
    """The one model of an `InferResult`.

    Raises:
        ServerError: the answer is not one of a Darkroom server, or tells of more models or none.
    """
    models = parse_models(result)
    with _reading():
        (model,) = models
    return model


def parse_event(result: Any) -> Event | None:
    """The event of an `InferResult`; None for one of a kind that a newer server has.

    Raises:
        ServerError: the answer is not one of a Darkroom server.
    """
    with _reading():
        event = json.loads(result.as_numpy("event")[0])
        kind = event["type"]
        if not isinstance(kind, str):
            raise TypeError(f"type {kind!r}")
        if kind == "queued":
            return Queued(_whole(event, "position"))
        if kind in ("step", "preview"):
            index, step, num_steps = (_whole(event, it) for it in ("index", "step", "num_steps"))
            if kind == "step":
                return Step(index, step, num_steps)
            return Preview(index, step, num_steps, _image(result.as_numpy("preview")[0]))
    return Done(parse(result)) if kind == "done" else None


def parse_cancelled(result: Any) -> bool:
    """Whether a request was cancelled.

    Raises:
        ServerError: the answer is not one of a Darkroom server.
    """
    with _reading():
        return bool(result.as_numpy("cancelled")[0])


def _made(result: Any) -> list[tuple[bytes, int, dict[str, Any]]]:
    """What was made: the file, its seed, and what is told of the request and of this one."""
    encoded = result.as_numpy("image")
    seeds = result.as_numpy("seed")
    info = json.loads(result.as_numpy("info")[0])
    if not isinstance(info, dict):
        raise TypeError("info is not an object")
    # Told only where there is a safety checker.
    checked = info.get(_CHECKED) or [None] * len(encoded)
    made = [
        (data, int(seed), {**info, _CHECKED: is_unsafe})
        for data, seed, is_unsafe in zip(encoded, seeds, checked, strict=True)
    ]
    if not made:
        raise ValueError("nothing was made")
    return made


@contextmanager
def _reading() -> Iterator[None]:
    """Make one error of all that shows a malformed answer."""
    try:
        yield
    except (TypeError, ValueError, LookupError, OSError, SyntaxError, struct.error) as error:
        raise ServerError(f"the server's answer cannot be read: {error!r}") from error


def _whole(event: dict[str, Any], name: str) -> int:
    value = event[name]
    if not isinstance(value, int):
        raise TypeError(f"{name} {value!r}")
    return value


def _image(encoded: bytes) -> Image.Image:
    with Image.open(BytesIO(encoded)) as image:
        image.load()
    return image
