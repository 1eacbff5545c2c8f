"""Answers become pictures, events or errors, over gRPC and JSON alike; nonsense a ServerError."""

import json
from collections.abc import Callable
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from fake_triton import (
    INFO,
    MODEL_INFO,
    encode_latents,
    encode_picture,
    paint,
    tell,
    to_json,
)
from PIL import Image
from tritonclient.grpc import InferResult, service_pb2
from tritonclient.utils import np_to_triton_dtype, serialize_byte_tensor

from darkroom import (
    DarkroomError,
    Done,
    InvalidRequest,
    Preview,
    Queued,
    QueueFull,
    RequestTimeout,
    ServerError,
    ServerUnavailable,
    Step,
)
from darkroom.answers import (
    from_grpc,
    from_json,
    http_error,
    parse,
    parse_cancelled,
    parse_event,
    parse_latents,
    parse_model,
    parse_models,
    server_sent_events,
)


class Result:
    """An `InferResult`, as far as the functions look."""

    def __init__(self, **arrays: Any) -> None:
        self._arrays = {**paint({"seed": 1}), **arrays}

    @classmethod
    def telling(cls, event: Any, **arrays: Any) -> "Result":
        return cls(event=texts(json.dumps(event).encode()), **arrays)

    def as_numpy(self, name: str) -> Any:
        return self._arrays.get(name)


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


def test_a_safety_checker_tells_of_each_picture() -> None:
    arrays = paint({"seed": 7, "num_images_per_prompt": 2})
    info = {**INFO, "nsfw_content_detected": [False, True]}
    pictures = parse(Result(**{**arrays, "info": texts(json.dumps(info).encode())}))

    assert [picture.nsfw_content_detected for picture in pictures] == [False, True]


def test_an_answer_becomes_latents_in_order() -> None:
    fields = {"seed": 7, "num_images_per_prompt": 2, "output_format": "latent"}
    latents = parse_latents(Result(**paint(fields)))

    assert [it.seed for it in latents] == [7, 8]
    assert [it.array[0, 0, 0] for it in latents] == [7, 8]
    assert latents[0].info["model"] == "fake"


@pytest.mark.parametrize(
    "arrays",
    [
        {"image": None},
        {"image": texts(), "seed": np.array([], np.int64)},
        {"image": texts(b"")},
        {"image": texts(encode_picture(1))},
        {"image": texts(encode_latents(1)[:-1])},
        {"info": texts(b"3")},
    ],
)
def test_malformed_latents_are_a_server_error(arrays: dict[str, Any]) -> None:
    latents = paint({"seed": 1, "output_format": "latent"})

    with pytest.raises(ServerError, match="the server's answer cannot be read: "):
        parse_latents(Result(**{**latents, **arrays}))


def test_models_are_read() -> None:
    told = texts(json.dumps([MODEL_INFO]).encode())

    assert parse_models(Result(models=told)) == [parse_model(Result(models=told))]


@pytest.mark.parametrize(
    "models", [None, texts(), texts(b"no JSON"), texts(b"3"), texts(b"{}"), texts(b"[3]")]
)
def test_malformed_models_are_a_server_error(models: Any) -> None:
    for read in (parse_models, parse_model):
        with pytest.raises(ServerError, match="the server's answer cannot be read: "):
            read(Result(models=models))


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
        {"info": texts(json.dumps({**INFO, "nsfw_content_detected": [True, False]}).encode())},
        {"info": texts(json.dumps({**INFO, "nsfw_content_detected": True}).encode())},
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
        parse(InferResult(response))


WHERE = {"index": 1, "step": 5, "num_steps": 20}


def test_events_are_read() -> None:
    assert parse_event(Result.telling({"type": "queued", "position": 3})) == Queued(3)
    assert parse_event(Result.telling({"type": "step", **WHERE})) == Step(1, 5, 20)


def test_a_preview_is_an_image() -> None:
    jpeg = encode_picture(200, (8, 8), "JPEG")
    event = parse_event(Result.telling({"type": "preview", **WHERE}, preview=texts(jpeg)))

    assert isinstance(event, Preview)
    assert (event.index, event.step, event.num_steps) == (1, 5, 20)
    with Image.open(BytesIO(jpeg)) as expected:
        assert event.image.tobytes() == expected.tobytes()


def test_the_last_event_has_the_pictures() -> None:
    arrays = paint({"seed": 7, "num_images_per_prompt": 2})
    event = parse_event(Result.telling({"type": "done"}, **arrays))

    assert isinstance(event, Done)
    assert [picture.seed for picture in event.pictures] == [7, 8]


def test_what_a_newer_server_adds_is_no_error() -> None:
    assert parse_event(Result.telling({"type": "weather", "rain": True})) is None
    assert parse_event(Result.telling({"type": "queued", "position": 3, "of": 9})) == Queued(3)


@pytest.mark.parametrize(
    "event",
    [
        None,
        3,
        [],
        "done",
        {},
        {"type": None},
        {"type": 3},
        {"type": ["step"]},
        {"type": "queued"},
        {"type": "queued", "position": "3"},
        {"type": "queued", "position": 1.5},
        {"type": "step", "index": 0, "step": 5},
        {"type": "step", "index": 0, "step": None, "num_steps": 20},
        {"type": "preview", **WHERE},
    ],
)
def test_a_malformed_event_is_a_server_error(event: Any) -> None:
    with pytest.raises(ServerError, match="the server's answer cannot be read: "):
        parse_event(Result.telling(event))


@pytest.mark.parametrize("arrays", [{}, {"event": texts()}, {"event": texts(b"no JSON")}])
def test_an_answer_that_tells_nothing_is_a_server_error(arrays: dict[str, Any]) -> None:
    with pytest.raises(ServerError, match="the server's answer cannot be read: "):
        parse_event(Result(**arrays))


@pytest.mark.parametrize("preview", [texts(), texts(b""), texts(encode_picture(1)[:50])])
def test_a_malformed_preview_is_a_server_error(preview: np.ndarray) -> None:
    with pytest.raises(ServerError, match="the server's answer cannot be read: "):
        parse_event(Result.telling({"type": "preview", **WHERE}, preview=preview))


def test_done_without_pictures_is_a_server_error() -> None:
    with pytest.raises(ServerError, match="the server's answer cannot be read: "):
        parse_event(Result.telling({"type": "done"}, image=None))


def test_whether_a_request_was_cancelled_is_read() -> None:
    for is_cancelled in (True, False):
        assert parse_cancelled(Result(cancelled=np.array([is_cancelled]))) is is_cancelled
    for malformed in (None, np.array([], bool)):
        with pytest.raises(ServerError, match="the server's answer cannot be read: "):
            parse_cancelled(Result(cancelled=malformed))


def in_grpc(arrays: dict[str, np.ndarray]) -> Any:
    response = service_pb2.ModelInferResponse()
    for name, array in arrays.items():
        datatype = np_to_triton_dtype(array.dtype)
        response.outputs.add(name=name, datatype=datatype, shape=array.shape)
        is_text = datatype == "BYTES"
        raw = serialize_byte_tensor(array).item() if is_text else array.tobytes()
        response.raw_output_contents.append(raw)
    return from_grpc(service_pb2.ModelStreamInferResponse(infer_response=response))


def in_json(arrays: dict[str, np.ndarray]) -> Any:
    return from_json(json.dumps(to_json(arrays)).encode())


@pytest.mark.parametrize("wire", [in_grpc, in_json])
@pytest.mark.parametrize("count", [1, 2])
def test_both_wires_carry_the_same(
    wire: Callable[[dict[str, np.ndarray]], Any], count: int
) -> None:
    preview = {"preview": texts(encode_picture(9, (8, 8), "JPEG"))}

    assert parse_event(wire(tell(type="step", **WHERE))) == Step(1, 5, 20)
    seen = parse_event(wire({**tell(type="preview", **WHERE), **preview}))
    assert isinstance(seen, Preview)
    assert seen.image.size == (8, 8)
    arrays = paint({"seed": 2**62, "num_images_per_prompt": count})
    done = parse_event(wire({**tell(type="done"), **arrays}))
    assert isinstance(done, Done)
    assert [picture.seed for picture in done.pictures] == [2**62, 2**62 + 1][:count]
    assert [picture.encoded for picture in done.pictures] == arrays["image"].tolist()


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"no JSON",
        b"\xff",
        b"3",
        b"[]",
        b"{}",
        b'{"event": null}',
        b'{"event": 3}',
        b'{"event": []}',
        b'{"event": {"type": "step"}}',
        b'{"event": "{\\"type\\": \\"done\\"}", "image": "?", "seed": 1, "info": "{}"}',
        b'{"event": "{\\"type\\": \\"done\\"}", "image": 3, "seed": 1, "info": "{}"}',
    ],
)
def test_malformed_json_is_a_server_error(answer: bytes) -> None:
    with pytest.raises(ServerError, match="the server's answer cannot be read: "):
        parse_event(from_json(answer))


@pytest.mark.parametrize("size", [1, 2, 3, 1000])
def test_events_are_cut_out_of_chunks_of_any_size(size: int) -> None:
    body = (
        b": a comment\n\n"
        b"data: one\n\n"
        b"id: 3\ndata:two\r\n\r\n"
        b"data: {\ndata: }\n\n\n"
        b"data: \n\n"
        b"data: cut off\n"
    )
    chunks = [body[start : start + size] for start in range(0, len(body), size)]

    assert list(server_sent_events(chunks)) == [b" one", b"two", b" {\n }", b" "]


MESSAGES: list[tuple[str, type[DarkroomError]]] = [
    ("width: 3 is out of range", InvalidRequest),
    ("the queue is full: 12 pictures are waiting; retry_after_ms: 850", QueueFull),
    ("timeout_ms: 500 ran out", RequestTimeout),
    ("unet failed: out of memory", ServerError),
]


@pytest.mark.parametrize(("message", "error"), MESSAGES)
def test_an_error_in_an_answer_is_raised(message: str, error: type[DarkroomError]) -> None:
    for read, answer in (
        (from_grpc, service_pb2.ModelStreamInferResponse(error_message=message)),
        (from_json, json.dumps({"error": message}).encode()),
    ):
        with pytest.raises(DarkroomError) as caught:
            read(answer)
        assert type(caught.value) is error
        assert str(caught.value) == message


@pytest.mark.parametrize(
    ("status", "body", "error", "message"),
    [
        (404, b'{"error": "unknown model"}', ServerUnavailable, "unknown model"),
        (400, b'{"error": "width: 3"}', InvalidRequest, "width: 3"),
        (503, b"", ServerUnavailable, "HTTP 503: "),
        (502, b"<html>Bad Gateway\xff", ServerError, "HTTP 502: <html>Bad Gateway\ufffd"),
        (500, b"[]", ServerError, "HTTP 500: []"),
        (500, b'{"detail": 1}', ServerError, 'HTTP 500: {"detail": 1}'),
    ],
)
def test_an_answer_of_http_itself_is_an_error(
    status: int, body: bytes, error: type[DarkroomError], message: str
) -> None:
    caught = http_error(status, body)

    assert (type(caught), str(caught)) == (error, message)
