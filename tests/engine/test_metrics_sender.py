"""The engine's metrics on their way to the model that publishes them, or to nobody."""

import socket
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from engine_harness import WAIT_S

import darkroom_wire as wire
from darkroom_engine import METRICS, MetricsSender, metrics, metrics_sender


@pytest.fixture(autouse=True)
def runtime_dir(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(wire.RUNTIME_DIR, str(short_path / "runtime"))
    wire.make_runtime_dir()


class Publisher:
    """Takes what one sender tells."""

    def __init__(self) -> None:
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.settimeout(WAIT_S)
        wire.metrics_path().unlink(missing_ok=True)
        self._listener.bind(str(wire.metrics_path()))
        self._listener.listen()

    def accept(self) -> Connection:
        accepted, _ = self._listener.accept()
        return Connection(accepted.detach())

    def close(self) -> None:
        self._listener.close()


@pytest.fixture
def publisher() -> Iterator[Publisher]:
    publisher = Publisher()
    yield publisher
    publisher.close()


@pytest.fixture
def sender() -> Iterator[MetricsSender]:
    sender = MetricsSender("sdxl")
    yield sender
    sender.close()


def message(connection: Connection) -> dict[str, Any]:
    assert connection.poll(WAIT_S)
    return wire.receive(connection)[0]


def told(connection: Connection, count: int) -> list[list[Any]]:
    """So many records, in as many messages as they take."""
    records: list[list[Any]] = []
    while len(records) < count:
        records += message(connection)["records"]
    return records


def test_an_engine_introduces_itself_and_its_table(
    publisher: Publisher, sender: MetricsSender
) -> None:
    sender.start()
    with publisher.accept() as connection:
        header = message(connection)

    assert header["model"] == "sdxl"
    assert [metric["name"] for metric in header["metrics"]] == [metric.name for metric in METRICS]
    assert header["metrics"][0] == {
        "name": "darkroom_requests_total",
        "kind": "COUNTER",
        "description": metrics.REQUESTS.description,
        "label": "outcome",
        "buckets": [],
    }


def test_records_are_told_in_order_and_equal_gauges_once(
    publisher: Publisher, sender: MetricsSender
) -> None:
    sender.start()
    with publisher.accept() as connection:
        message(connection)
        sender.record(metrics.REQUESTS, 1, "image")
        sender.record(metrics.BATCH_ROWS, 4)
        for _ in range(3):
            sender.record(metrics.RUNNING, 2)

        assert told(connection, 3) == [
            ["darkroom_requests_total", 1, "image"],
            ["darkroom_batch_rows", 4, ""],
            ["darkroom_running_pictures", 2, ""],
        ]
        sender.record(metrics.RUNNING, 2)
        sender.record(metrics.IMAGES, 1)
        assert told(connection, 1) == [["darkroom_images_total", 1, ""]]


def test_what_comes_while_nobody_listens_waits(sender: MetricsSender) -> None:
    sender.start()
    sender.record(metrics.IMAGES, 1)
    sender.record(metrics.MAX_ROWS, 16)
    publisher = Publisher()
    with publisher.accept() as connection:
        message(connection)

        assert told(connection, 2) == [
            ["darkroom_images_total", 1, ""],
            ["darkroom_max_rows", 16, ""],
        ]
    publisher.close()


def test_what_there_is_no_room_for_is_dropped_and_counted(
    sender: MetricsSender, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics_sender, "MAX_RECORDS", 2)
    for _ in range(5):
        sender.record(metrics.IMAGES, 1)
    publisher = Publisher()
    sender.start()
    with publisher.accept() as connection:
        message(connection)

        assert told(connection, 3) == [
            *[["darkroom_images_total", 1, ""]] * 2,
            ["darkroom_dropped_records_total", 3, ""],
        ]
    publisher.close()


def test_the_next_publisher_hears_the_gauges_again_and_what_was_lost(
    publisher: Publisher, sender: MetricsSender
) -> None:
    sender.record(metrics.MAX_ROWS, 16)
    sender.start()
    with publisher.accept() as connection:
        message(connection)
        told(connection, 1)
    # It notices by the next record, which is lost; those after it are not.
    sender.record(metrics.IMAGES, 1)
    with publisher.accept() as connection:
        message(connection)
        records = told(connection, 2)
        sender.record(metrics.IMAGES, 1)
        records += told(connection, 1)

    assert records == [
        ["darkroom_max_rows", 16, ""],
        ["darkroom_dropped_records_total", 1, ""],
        ["darkroom_images_total", 1, ""],
    ]


def test_the_last_records_are_told_at_the_end(publisher: Publisher, sender: MetricsSender) -> None:
    sender.start()
    with publisher.accept() as connection:
        message(connection)
        sender.record(metrics.IMAGES, 1)
        sender.close()

        assert told(connection, 1) == [["darkroom_images_total", 1, ""]]
        assert connection.poll(WAIT_S)
        with pytest.raises(EOFError):
            wire.receive(connection)


def test_an_engine_ends_though_nobody_ever_listened(sender: MetricsSender) -> None:
    sender.start()
    sender.record(metrics.IMAGES, 1)
    sender.close()

    assert not sender._thread.is_alive()
