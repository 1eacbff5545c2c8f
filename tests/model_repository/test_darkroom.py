"""The server's own model: what there is to ask, and the metrics of all engines."""

import json
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import triton_python_backend_utils as pb_utils
from engine_harness import WAIT_S
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

import darkroom_wire as wire
from darkroom_engine import Metric, MetricsSender, Notice, metrics
from darkroom_engine.metrics import Kind

MODELS = Path(__file__).parents[2] / "model_repository"


@pytest.fixture(autouse=True)
def runtime_dir(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(wire.RUNTIME_DIR, str(short_path / "runtime"))


@pytest.fixture
def make_model(
    load_model: Callable[[str], ModuleType],
    server: pb_utils.Server,  # noqa: ARG001  empties it
) -> Iterator[Callable[[], Any]]:
    models = []

    def make() -> Any:
        model = load_model("darkroom").TritonPythonModel()
        model.initialize({})
        models.append(model)
        return model

    yield make
    for model in models:
        model.finalize()


@pytest.fixture
def model(make_model: Callable[[], Any]) -> Any:
    return make_model()


@pytest.fixture
def make_sender() -> Iterator[Callable[[str], MetricsSender]]:
    senders = []

    def make(name: str) -> MetricsSender:
        sender = MetricsSender(name)
        sender.start()
        senders.append(sender)
        return sender

    yield make
    for sender in senders:
        sender.close()


def ask(model: Any, name: bytes | None = None) -> pb_utils.InferenceResponse:
    array = np.array([name], np.object_)
    inputs = [] if name is None else [pb_utils.Tensor("model", array)]
    (response,) = model.execute([pb_utils.InferenceRequest(inputs=inputs)])
    return response


def listed(response: pb_utils.InferenceResponse) -> list[dict[str, Any]]:
    (tensor,) = response.output_tensors()
    assert (tensor.name(), tensor.as_numpy().shape) == ("models", (1,))
    return json.loads(tensor.as_numpy()[0])


def series(server: pb_utils.Server, metric: Metric, *labels: tuple[str, str]) -> pb_utils.Metric:
    """A series, once there is one."""
    for _ in range(int(WAIT_S / 0.01)):
        family = server.families.get(metric.name)
        if family and labels in family.series:
            return family.series[labels]
        threading.Event().wait(0.01)
    raise AssertionError(f"{metric.name} {labels} never came")


def test_all_models_that_are_warm_are_listed_by_their_names(model: Any) -> None:
    assert listed(ask(model)) == []
    Notice("stable_diffusion").post({"family": "sd1"})
    Notice("sdxl").post({"family": "sdxl"})

    assert listed(ask(model)) == [
        {"model": "sdxl", "family": "sdxl"},
        {"model": "stable_diffusion", "family": "sd1"},
    ]


def test_one_model_is_a_list_of_one(model: Any) -> None:
    Notice("stable_diffusion").post({"family": "sd1"})
    Notice("sdxl").post({"family": "sdxl"})

    assert listed(ask(model, b"sdxl")) == [{"model": "sdxl", "family": "sdxl"}]


@pytest.mark.parametrize("name", [b"sd3", b"", b"\xff", b"../sdxl"])
def test_an_unknown_model_is_refused_with_those_that_there_are(model: Any, name: bytes) -> None:
    Notice("sdxl").post({})
    error = ask(model, name).error()

    assert error.code() == pb_utils.TritonError.INVALID_ARG
    text = name.decode(errors="replace")
    assert error.message() == f"model: {text!r} does not exist, there are sdxl"


def test_the_config_asks_for_nothing() -> None:
    text = (MODELS / "darkroom" / "config.pbtxt").read_text()
    config = text_format.Parse(text, model_config_pb2.ModelConfig())

    assert [(it.name, list(it.dims), it.optional) for it in config.input] == [("model", [1], True)]
    assert [(it.name, list(it.dims)) for it in config.output] == [("models", [1])]
    assert config.name == "darkroom"


@pytest.mark.usefixtures("model")
def test_every_series_has_the_label_of_its_model(
    make_sender: Callable[[str], MetricsSender], server: pb_utils.Server
) -> None:
    for name, count in (("stable_diffusion", 2), ("sdxl", 3)):
        sender = make_sender(name)
        sender.record(metrics.REQUESTS, count, "image")
        sender.record(metrics.MAX_ROWS, 10 * count)
        sender.record(metrics.BATCH_ROWS, 4)

    for name, count in (("stable_diffusion", 2), ("sdxl", 3)):
        label = ("model", name)
        requests = series(server, metrics.REQUESTS, label, ("outcome", "image"))
        assert requests.values == [count]
        assert series(server, metrics.MAX_ROWS, label).values == [10 * count]
        rows = series(server, metrics.BATCH_ROWS, label)
        assert (rows.values, rows.buckets) == ([4], list(metrics.BATCH_ROWS.buckets))


@pytest.mark.usefixtures("model")
def test_a_metric_that_cannot_be_published_leaves_the_others_alone(
    make_sender: Callable[[str], MetricsSender],
    server: pb_utils.Server,
    caplog: pytest.LogCaptureFixture,
) -> None:
    sender = make_sender("sdxl")
    sender.record(Metric("darkroom_unheard_of", Kind.COUNTER, "It is in no table"), 1)
    sender.record(metrics.IMAGES, 1)

    assert series(server, metrics.IMAGES, ("model", "sdxl")).values == [1]
    assert "a metric could not be published" in caplog.text


@pytest.mark.usefixtures("model")
def test_nonsense_ends_its_connection_and_no_other(
    make_sender: Callable[[str], MetricsSender], server: pb_utils.Server
) -> None:
    sender = make_sender("sdxl")
    sender.record(metrics.IMAGES, 1)
    series(server, metrics.IMAGES, ("model", "sdxl"))
    with wire.connect(wire.metrics_path()) as connection:
        connection.send_bytes(b"no json")
        assert connection.poll(WAIT_S)
        with pytest.raises(EOFError):
            connection.recv_bytes()
    sender.record(metrics.MAX_ROWS, 2)

    assert series(server, metrics.MAX_ROWS, ("model", "sdxl")).values == [2]


def test_a_connection_that_fails_does_not_end_the_others(
    make_model: Callable[[], Any],
    make_sender: Callable[[str], MetricsSender],
    server: pb_utils.Server,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As when there are no file descriptors left for a while."""
    accept = socket.socket.accept
    failures = [OSError("Too many open files"), OSError("Too many open files")]

    def accept_later(listener: socket.socket) -> Any:
        if failures:
            raise failures.pop()
        return accept(listener)

    monkeypatch.setattr(socket.socket, "accept", accept_later)
    make_model()
    sender = make_sender("sdxl")
    sender.record(metrics.MAX_ROWS, 16)

    assert series(server, metrics.MAX_ROWS, ("model", "sdxl")).values == [16]
    assert "an engine's connection failed: Too many open files" in caplog.text


def test_a_newer_instance_publishes_when_the_older_is_through(
    make_model: Callable[[], Any],
    make_sender: Callable[[str], MetricsSender],
    server: pb_utils.Server,
) -> None:
    """As when Triton loads the new one before it has unloaded the old one."""
    older = make_model()
    sender = make_sender("sdxl")
    sender.record(metrics.MAX_ROWS, 16)
    series(server, metrics.MAX_ROWS, ("model", "sdxl"))
    make_model()
    sender.record(metrics.IMAGES, 1)
    assert series(server, metrics.IMAGES, ("model", "sdxl")).values == [1]
    older.finalize()
    server.families.clear()
    # What was told to the older one in its last moments is lost.
    while metrics.IMAGES.name not in server.families:
        sender.record(metrics.IMAGES, 1)
        threading.Event().wait(0.1)

    assert series(server, metrics.MAX_ROWS, ("model", "sdxl")).values == [16]


def test_an_instance_that_ends_while_it_waits_for_another_ends(
    make_model: Callable[[], Any],
) -> None:
    make_model()
    make_model().finalize()
