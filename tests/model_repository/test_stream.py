"""The streaming and the cancelling face: thin, and closed off from each other's requests."""

import base64
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import triton_python_backend_utils as pb_utils
from engine_harness import WAIT_S, Harness, make_engine  # noqa: F401  fixtures are found by name
from fake_networks import FakeNetworks
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

import darkroom_wire as wire
from darkroom_engine import Door

MODELS = Path(__file__).parents[2] / "model_repository"
FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


@pytest.fixture
def networks() -> FakeNetworks:
    return FakeNetworks()


@pytest.fixture(autouse=True)
def runtime_dir(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(wire.RUNTIME_DIR, str(short_path / "runtime"))


@pytest.fixture
def engine(make_engine: Callable[..., Harness]) -> Iterator[Harness]:  # noqa: F811  the fixture
    harness = make_engine()
    door = Door(harness.engine, "stable_diffusion")
    door.start()
    yield harness
    door.close()


@pytest.fixture
def stream(
    load_model: Callable[[str], ModuleType],
    as_triton_tells_it: Callable[[Any], str],
    server: pb_utils.Server,  # noqa: ARG001  counts what would crash it
) -> Iterator[Any]:
    text = (MODELS / "stable_diffusion_stream" / "config.pbtxt").read_text()
    config = text_format.Parse(text, model_config_pb2.ModelConfig())
    model = load_model("stable_diffusion_stream").TritonPythonModel()
    model.initialize(
        {"model_config": as_triton_tells_it(config), "model_name": "stable_diffusion_stream"}
    )
    yield model
    model.finalize()


@pytest.fixture
def cancel(
    load_model: Callable[[str], ModuleType], as_triton_tells_it: Callable[[Any], str]
) -> Callable[..., pb_utils.InferenceResponse]:
    text = (MODELS / "stable_diffusion_cancel" / "config.pbtxt").read_text()
    config = text_format.Parse(text, model_config_pb2.ModelConfig())
    model = load_model("stable_diffusion_cancel").TritonPythonModel()
    model.initialize(
        {"model_config": as_triton_tells_it(config), "model_name": "stable_diffusion_cancel"}
    )

    def ask(*request_ids: bytes) -> pb_utils.InferenceResponse:
        tensor = pb_utils.Tensor("request_id", np.array(request_ids, np.object_))
        (response,) = model.execute([pb_utils.InferenceRequest(inputs=[tensor])])
        return response

    return ask


DTYPES = {"seed": np.int64, "guidance_scale": np.float32}


def send(stream: Any, request_id: str = "", **fields: Any) -> pb_utils.ResponseSender:
    tensors = []
    for name, value in {"prompt": "a cat", "seed": 0, **fields}.items():
        if isinstance(value, np.ndarray):
            array = value
        elif isinstance(value, str):
            array = np.array([value.encode()], np.object_)
        else:
            array = np.array([value], DTYPES.get(name, np.int32))
        tensors.append(pb_utils.Tensor(name, array))
    request = pb_utils.InferenceRequest(inputs=tensors, request_id=request_id)
    assert stream.execute([request]) is None
    return request.sender


def hear(sender: pb_utils.ResponseSender) -> list[dict[str, np.ndarray]]:
    """All responses of a stream that went well."""
    sender.wait_for_end(WAIT_S)
    answers = []
    for response in sender.sent:
        assert not response.has_error(), response.error().message()
        answers.append({t.name(): t.as_numpy() for t in response.output_tensors()})
    return answers


def error_of(sender: pb_utils.ResponseSender) -> tuple[int, str]:
    sender.wait_for_end(WAIT_S)
    error = sender.sent[-1].error()
    return error.code(), error.message()


def kinds(answers: list[dict[str, np.ndarray]]) -> list[str]:
    return [json.loads(answer["event"][0])["type"] for answer in answers]


def hold(engine: Harness) -> None:
    engine.picture()
    engine.networks.is_entered.clear()
    engine.networks.gate.clear()


def wait_for_jobs(engine: Harness, count: int) -> None:
    while len(engine.engine._watcher.jobs()) != count:
        threading.Event().wait(0.01)


def test_events_previews_and_the_picture_come_in_order(stream: Any, engine: Harness) -> None:
    answers = hear(send(stream, num_inference_steps=4, preview_interval=2, seed=3))

    assert kinds(answers) == ["queued", "step", "step", "preview", "step", "step", "done"]
    assert set(answers[1]) == {"event"}
    assert set(answers[3]) == {"event", "preview"}
    assert answers[3]["preview"][0].startswith(b"\xff\xd8")
    last = answers[-1]
    assert set(last) == {"event", "image", "seed", "info"}
    assert last["image"][0] == engine.picture(num_inference_steps=4, seed=3)
    assert (last["seed"].dtype, last["seed"].tolist()) == (np.int64, [3])
    assert json.loads(last["info"][0])["num_inference_steps"] == 4


@pytest.mark.usefixtures("engine")
def test_for_json_the_preview_is_text_too(stream: Any) -> None:
    answers = hear(send(stream, num_inference_steps=3, preview_interval=2, output_format="b64_png"))

    assert kinds(answers)[3] == "preview"
    assert base64.b64decode(answers[3]["preview"][0], validate=True).startswith(b"\xff\xd8")


def test_many_streams_at_once_share_the_batch(stream: Any, engine: Harness) -> None:
    alone = [engine.picture(seed=seed, guidance_scale=1.0) for seed in range(24)]
    hold(engine)
    senders = [send(stream, seed=seed, guidance_scale=1.0) for seed in range(24)]
    wait_for_jobs(engine, 24)
    engine.networks.step_rows.clear()
    engine.networks.gate.set()

    assert [hear(sender)[-1]["image"][0] for sender in senders] == alone
    assert max(engine.networks.step_rows) == 16


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"width": 33}, "width: 33 is not a multiple of 16"),
        ({"preview_interval": -1}, "preview_interval: -1 is out of range, allowed are 0 and more"),
        ({"seed": np.array([1, 2], np.int64)}, "seed: shape [2] is not [1]"),
        ({"sampler": "magic"}, "sampler: 'magic' does not exist"),
    ],
)
def test_bad_input_is_an_invalid_argument(
    stream: Any, fields: dict[str, Any], message: str
) -> None:
    code, text = error_of(send(stream, **fields))

    assert code == pb_utils.TritonError.INVALID_ARG
    assert text.startswith(message)
    assert hear(send(stream, num_inference_steps=1))


def test_a_client_that_leaves_cancels_its_request_alone(stream: Any, engine: Harness) -> None:
    expected = engine.picture("neighbour", num_inference_steps=9)
    hold(engine)
    leaver = send(stream, num_inference_steps=60)
    neighbour = send(stream, prompt="neighbour", num_inference_steps=9)
    wait_for_jobs(engine, 2)
    leaver.client_has_left = True
    wait_for_jobs(engine, 1)
    engine.networks.gate.set()

    assert error_of(leaver) == (pb_utils.TritonError.CANCELLED, "the request was cancelled")
    assert hear(neighbour)[-1]["image"][0] == expected


def test_a_failure_ends_the_stream(stream: Any, engine: Harness) -> None:
    engine.networks.fail_always["vae_decoder"] = RuntimeError("out of memory")
    code, text = error_of(send(stream, num_inference_steps=2))

    assert (code, text) == (
        pb_utils.TritonError.INTERNAL,
        "this is a bug: RuntimeError('out of memory')",
    )


def test_without_an_engine_streams_are_unavailable(stream: Any) -> None:
    code, text = error_of(send(stream))

    assert code == pb_utils.TritonError.UNAVAILABLE
    assert text.startswith("the engine is not running")


def test_an_engine_that_dies_is_an_error_not_silence(stream: Any) -> None:
    from multiprocessing.connection import Listener

    wire.make_runtime_dir()
    with Listener(str(wire.socket_path("stable_diffusion")), family="AF_UNIX") as listener:
        sender = send(stream)
        connection = listener.accept()
        wire.receive(connection)
        # Half a message.
        connection.send_bytes(b'{"event": {"type": "step"}, "num_blobs": 1}')
        connection.close()

    assert error_of(sender) == (
        pb_utils.TritonError.UNAVAILABLE,
        "the engine stopped before the picture was done",
    )


def test_a_stream_that_cannot_be_served_takes_no_other_with_it(
    stream: Any, engine: Harness
) -> None:
    hold(engine)
    broken, fine = send(stream), send(stream, seed=1)
    wait_for_jobs(engine, 2)
    broken.is_broken = True
    engine.networks.gate.set()

    assert kinds(hear(fine))[-1] == "done"
    wait_for_jobs(engine, 0)
    assert kinds(hear(send(stream)))[-1] == "done"


@pytest.mark.usefixtures("engine")
def test_an_id_that_is_no_text_is_refused(stream: Any) -> None:
    assert error_of(send(stream, "\xff")) == (
        pb_utils.TritonError.INVALID_ARG,
        "id: not UTF-8 text",
    )


def test_finalize_ends_open_streams(stream: Any, engine: Harness) -> None:
    hold(engine)
    sender = send(stream)
    wait_for_jobs(engine, 1)
    stream.finalize()

    assert error_of(sender) == (pb_utils.TritonError.UNAVAILABLE, "the server is stopping")


def test_an_ended_stream_is_never_asked_about(
    stream: Any, engine: Harness, server: pb_utils.Server
) -> None:
    for _ in range(5):
        senders = [send(stream, seed=n, num_inference_steps=n + 1) for n in range(8)]
        for sender in senders:
            hear(sender)
    engine.picture()

    assert server.num_crashes == 0


def test_a_request_of_either_face_is_cancelled_by_its_id(
    stream: Any, cancel: Callable[..., pb_utils.InferenceResponse], engine: Harness
) -> None:
    hold(engine)
    streamed = send(stream, "one", num_inference_steps=60)
    answered = threading.Event()
    engine.engine.ask(
        {"prompt": b"", "num_inference_steps": 60},
        lambda _: answered.set(),
        request_id="two",
    )
    wait_for_jobs(engine, 2)

    for request_id in (b"one", b"two"):
        (tensor,) = cancel(request_id).output_tensors()
        assert (tensor.name(), tensor.as_numpy().dtype) == ("cancelled", np.bool_)
        assert tensor.as_numpy().tolist() == [True]
    assert error_of(streamed)[0] == pb_utils.TritonError.CANCELLED
    assert answered.wait(WAIT_S)
    assert cancel(b"one").output_tensors()[0].as_numpy().tolist() == [False]


def test_an_id_of_several_requests_is_refused(
    stream: Any, cancel: Callable[..., pb_utils.InferenceResponse], engine: Harness
) -> None:
    hold(engine)
    for _ in range(2):
        send(stream, "same")
    wait_for_jobs(engine, 2)
    error = cancel(b"same").error()

    assert error.code() == pb_utils.TritonError.INVALID_ARG
    assert error.message() == "request_id: 'same' names 2 requests, allowed is one"


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("request_id", [b"", b"\xff"])
def test_an_id_that_is_none_is_refused(
    cancel: Callable[..., pb_utils.InferenceResponse], request_id: bytes
) -> None:
    error = cancel(request_id).error()

    assert error.code() == pb_utils.TritonError.INVALID_ARG
    assert error.message() == f"request_id: {request_id!r} is not the id of a request"


def test_without_an_engine_there_is_nothing_to_cancel(
    cancel: Callable[..., pb_utils.InferenceResponse],
) -> None:
    error = cancel(b"one").error()

    assert error.code() == pb_utils.TritonError.UNAVAILABLE
    assert error.message().startswith("the engine is not running")


def test_the_streams_inputs_are_the_engines_and_the_preview_interval(engine_config: Any) -> None:
    text = (MODELS / "stable_diffusion_stream" / "config.pbtxt").read_text()
    config = text_format.Parse(text, model_config_pb2.ModelConfig())

    assert list(config.input[:-1]) == list(engine_config.input)
    assert config.input[-1].name == "preview_interval"
    assert config.model_transaction_policy.decoupled
    assert [entry.name for entry in config.output] == ["event", "preview", "image", "seed", "info"]
