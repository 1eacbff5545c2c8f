"""The engine's socket: requests, events and cancels of the models beside it."""

import os
import stat
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from engine_harness import WAIT_S, Harness

import darkroom_wire as wire
from darkroom_engine import Door

MODEL = "stable_diffusion"


@pytest.fixture
def runtime_dir(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(wire.RUNTIME_DIR, str(short_path / "runtime"))
    return short_path / "runtime"


@pytest.fixture
def make_door(runtime_dir: Path) -> Iterator[Callable[[Harness], Door]]:  # noqa: ARG001  its place
    doors = []

    def make(harness: Harness) -> Door:
        door = Door(harness.engine, MODEL)
        door.start()
        doors.append(door)
        return door

    yield make
    for door in doors:
        door.close()


@pytest.fixture
def door(make_door: Callable[[Harness], Door], harness: Harness) -> Door:
    return make_door(harness)


def ask(request_id: str = "", preview_interval: int = 0, **fields: Any) -> Connection:
    raw = {name: v.encode() if isinstance(v, str) else v for name, v in fields.items()}
    header, blobs = wire.pack_fields({"prompt": b"a cat", "seed": 0, **raw})
    connection = wire.connect(wire.socket_path(MODEL))
    header |= {"op": "generate", "request_id": request_id, "preview_interval": preview_interval}
    wire.send(connection, header, blobs)
    return connection


def messages(connection: Connection) -> list[tuple[dict[str, Any], list[bytes]]]:
    """All until the last one."""
    received = []
    with connection:
        while True:
            assert connection.poll(WAIT_S)
            header, blobs = wire.receive(connection)
            received.append((header, blobs))
            if "error" in header or header["event"]["type"] == "done":
                return received


def cancel(request_id: str) -> dict[str, Any]:
    with wire.connect(wire.socket_path(MODEL)) as connection:
        wire.send(connection, {"op": "cancel", "request_id": request_id})
        assert connection.poll(WAIT_S)
        return wire.receive(connection)[0]


def hold(harness: Harness) -> None:
    harness.picture()
    harness.networks.is_entered.clear()
    harness.networks.gate.clear()


@pytest.mark.usefixtures("door")
def test_a_request_hears_its_events_and_gets_the_picture(harness: Harness) -> None:
    *events, (end, pictures) = messages(ask(num_inference_steps=6, preview_interval=2, seed=5))

    kinds = [header["event"]["type"] for header, _ in events]
    assert kinds == ["queued", "step", *["step", "preview", "step"] * 2, "step"]
    assert all(len(blobs) == (header["event"]["type"] == "preview") for header, blobs in events)
    assert (end["event"], end["seeds"]) == ({"type": "done"}, [5])
    assert end["info"]["num_inference_steps"] == 6
    assert pictures == [harness.picture(num_inference_steps=6, seed=5)]


@pytest.mark.usefixtures("door")
def test_many_at_once_share_the_batch_and_each_gets_its_own(harness: Harness) -> None:
    alone = [harness.picture(seed=seed, guidance_scale=1.0) for seed in range(16)]
    hold(harness)
    connections = [ask(seed=seed, guidance_scale=1.0) for seed in range(16)]
    while len(harness.engine._watcher.jobs()) < 16:
        threading.Event().wait(0.01)
    harness.networks.step_rows.clear()
    harness.networks.gate.set()

    assert [messages(connection)[-1][1][0] for connection in connections] == alone
    assert max(harness.networks.step_rows) > 8


@pytest.mark.usefixtures("door")
def test_a_refusal_is_the_only_message() -> None:
    ((header, _),) = messages(ask(width=33))

    assert header["code"] == "INVALID_ARG"
    assert header["error"].startswith("width: 33 is ")


@pytest.mark.usefixtures("door")
def test_the_end_of_a_connection_cancels_its_request_alone(harness: Harness) -> None:
    expected = harness.picture("neighbour", num_inference_steps=9)
    hold(harness)
    leaver = ask(num_inference_steps=60)
    neighbour = ask(prompt="neighbour", num_inference_steps=9)
    assert harness.networks.is_entered.wait(WAIT_S)
    leaver.close()
    while harness.engine.cancel("nobody") or len(harness.engine._watcher.jobs()) > 1:
        threading.Event().wait(0.01)
    harness.networks.gate.set()

    assert messages(neighbour)[-1][1] == [expected]


@pytest.mark.usefixtures("door")
def test_a_cancel_by_id_hits_its_request_alone(harness: Harness) -> None:
    hold(harness)
    first, second = ask("one", num_inference_steps=60), ask("two", num_inference_steps=3)
    job, _ = harness.ask_job()
    while len(harness.engine._watcher.jobs()) < 3:
        threading.Event().wait(0.01)

    assert cancel("one") == {"cancelled": True}
    harness.networks.gate.set()
    assert messages(first)[-1][0] == {"error": "the request was cancelled", "code": "CANCELLED"}
    assert messages(second)[-1][0]["event"] == {"type": "done"}
    assert not job.is_over or job.timings()
    assert cancel("one") == {"cancelled": False}


@pytest.mark.usefixtures("door")
def test_an_id_of_several_requests_cancels_none_of_them(harness: Harness) -> None:
    hold(harness)
    both = [ask("same", num_inference_steps=3) for _ in range(2)]
    while len(harness.engine._watcher.jobs()) < 2:
        threading.Event().wait(0.01)

    assert cancel("same") == {
        "error": "request_id: 'same' names 2 requests, allowed is one",
        "code": "INVALID_ARG",
    }
    harness.networks.gate.set()
    for connection in both:
        assert messages(connection)[-1][0]["event"] == {"type": "done"}


@pytest.mark.usefixtures("door")
def test_nonsense_ends_its_connection_and_no_other(harness: Harness) -> None:
    for raw in (b"no json", b"{}", b'{"num_blobs": 0}', b'{"op": "generate", "num_blobs": 0}'):
        with wire.connect(wire.socket_path(MODEL)) as connection:
            connection.send_bytes(raw)
            assert connection.poll(WAIT_S)
            with pytest.raises(EOFError):
                connection.recv_bytes()

    assert messages(ask())[-1][1] == [harness.picture()]


def test_a_socket_that_was_left_behind_is_replaced(
    make_door: Callable[[Harness], Door], harness: Harness, runtime_dir: Path
) -> None:
    runtime_dir.mkdir(mode=0o700)
    wire.socket_path(MODEL).touch()
    make_door(harness)

    assert messages(ask())[-1][1]


def test_a_newer_door_takes_the_place_and_keeps_it(
    make_door: Callable[[Harness], Door], harness: Harness
) -> None:
    """As when Triton loads the new engine before it unloads the old one."""
    older = Door(harness.engine, MODEL)
    older.start()
    newer = make_door(harness)
    assert messages(ask())[-1][1]
    older.close()

    assert messages(ask())[-1][1]
    newer.close()
    assert not wire.socket_path(MODEL).exists()


def test_a_path_that_is_too_long_is_named(
    harness: Harness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(wire.RUNTIME_DIR, str(tmp_path / ("x" * 100)))

    with pytest.raises(OSError, match="DARKROOM_RUNTIME_DIR names another folder, of a short path"):
        Door(harness.engine, MODEL)


@pytest.mark.usefixtures("door")
def test_only_its_own_user_may_come_in(runtime_dir: Path) -> None:
    assert stat.S_IMODE(runtime_dir.stat().st_mode) == 0o700


def test_a_folder_that_is_open_to_others_is_refused(harness: Harness, runtime_dir: Path) -> None:
    runtime_dir.mkdir()
    runtime_dir.chmod(0o755)

    with pytest.raises(PermissionError, match="open to others, no socket can lie"):
        Door(harness.engine, MODEL)


def test_models_of_one_server_find_each_other_without_a_word(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(wire.RUNTIME_DIR, raising=False)

    assert f"darkroom-{os.getppid()}-" in str(wire.socket_path(MODEL))


@pytest.mark.usefixtures("runtime_dir")
def test_without_an_engine_there_is_nobody_to_ask() -> None:
    with pytest.raises(OSError):  # noqa: PT011  whichever of its kinds
        wire.connect(wire.socket_path(MODEL))


def test_close_takes_no_more_but_ends_what_is_there(
    make_door: Callable[[Harness], Door], harness: Harness
) -> None:
    door = make_door(harness)
    hold(harness)
    connection = ask(num_inference_steps=2)
    assert harness.networks.is_entered.wait(WAIT_S)
    door.close()
    harness.networks.gate.set()

    assert messages(connection)[-1][1]
    with pytest.raises(OSError):  # noqa: PT011  whichever of its kinds
        wire.connect(wire.socket_path(MODEL))
