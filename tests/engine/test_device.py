"""An engine whose batch lies on a device, which computes a step while the next is prepared."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest
from engine_harness import WAIT_S, Harness
from fake_device import DeviceNetworks

from darkroom_engine import EngineConfig, EngineError, Manifest, NetworkFailed
from darkroom_engine.arrays import HOST

LONG = {"num_inference_steps": 30}


@pytest.fixture
def device() -> DeviceNetworks:
    return DeviceNetworks()


@pytest.fixture
def make_harness(manifest: Manifest, device: DeviceNetworks) -> Iterator[Callable[..., Harness]]:
    harnesses = []

    def make(**config: Any) -> Harness:
        harness = Harness(manifest, device, EngineConfig(**config))
        harnesses.append(harness)
        harness.engine.start()
        return harness

    yield make
    device.arrays.gate.set()
    for harness in harnesses:
        harness.engine.close()


@pytest.fixture
def harness(make_harness: Callable[..., Harness]) -> Harness:
    return make_harness()


def hold(harness: Harness, device: DeviceNetworks) -> None:
    """Warm up, then let no step end."""
    harness.picture()
    device.step_rows.clear()
    device.arrays.is_waited_for.clear()
    device.arrays.gate.clear()


def wait_until(is_so: Callable[[], bool]) -> None:
    give_up_at = time.monotonic() + WAIT_S
    while not is_so():
        assert time.monotonic() < give_up_at
        time.sleep(0.001)


def test_one_step_is_prepared_while_another_is_computed_and_no_more(
    harness: Harness, device: DeviceNetworks
) -> None:
    hold(harness, device)
    first = harness.ask(**LONG)
    assert device.arrays.is_waited_for.wait(WAIT_S)
    second = harness.ask(**LONG, seed=1)

    # Whoever comes while two are under way is in the third.
    assert device.step_rows == [2, 2]
    device.arrays.gate.set()
    assert first.result(WAIT_S).pictures != second.result(WAIT_S).pictures
    assert device.step_rows[:3] == [2, 2, 4]
    assert len(device.step_rows) <= 2 + 30


def test_the_last_step_is_waited_for_though_no_other_follows(harness: Harness) -> None:
    assert harness.picture(num_inference_steps=1) == harness.picture(num_inference_steps=1)


def test_output_that_is_not_finite_fails_its_rows_at_their_step(
    harness: Harness, device: DeviceNetworks
) -> None:
    alone = harness.picture("fine", **LONG)
    harness.picture("~x")
    device.poison_token = int(device.encoded[-1][0, 1])
    device.gate.clear()
    bad, good = harness.ask("~", **LONG), harness.ask("fine", **LONG)
    device.gate.set()

    with pytest.raises(NetworkFailed, match="not finite at step 1 of 30"):
        bad.result(WAIT_S)
    assert good.result(WAIT_S).pictures == [alone]


def test_what_is_under_way_when_the_engine_closes_is_answered(
    harness: Harness, device: DeviceNetworks
) -> None:
    hold(harness, device)
    # Its last step is under way: it is not the scheduler's any more.
    future = harness.ask(num_inference_steps=1)
    assert device.arrays.is_waited_for.wait(WAIT_S)
    other = harness.ask(**LONG)
    device.arrays.gate.set()
    harness.engine.close()

    errors = [one.exception(WAIT_S) for one in (future, other)]
    assert all(error is None or "stopping" in str(error) for error in errors)


def test_a_device_that_fails_while_it_computes_fails_the_step(
    harness: Harness, device: DeviceNetworks
) -> None:
    hold(harness, device)
    future = harness.ask(**LONG)
    assert device.arrays.is_waited_for.wait(WAIT_S)
    device.arrays.fails = NetworkFailed("device", "lost")
    device.arrays.gate.set()

    with pytest.raises(NetworkFailed, match="lost"):
        future.result(WAIT_S)
    device.arrays.fails = None
    assert harness.picture()


def test_a_surprise_fails_what_is_under_way_too(
    harness: Harness, device: DeviceNetworks, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold(harness, device)
    future = harness.ask(num_inference_steps=2)
    assert device.arrays.is_waited_for.wait(WAIT_S)

    def raise_it(*_: object) -> None:
        raise RuntimeError("device lost")

    monkeypatch.setattr(harness.engine, "_end_step", raise_it)
    device.arrays.gate.set()
    with pytest.raises(EngineError):
        future.result(WAIT_S)


def test_a_cancelled_request_leaves_the_batch(harness: Harness, device: DeviceNetworks) -> None:
    hold(harness, device)
    job, future = harness.ask_job(**LONG)
    assert device.arrays.is_waited_for.wait(WAIT_S)
    job.cancel()
    device.arrays.gate.set()

    with pytest.raises(EngineError):
        future.result(WAIT_S)
    assert harness.picture()
    assert device.step_rows[:2] == [2, 2]
    assert len(device.step_rows) <= 3 + 25


def test_listeners_hear_of_the_steps_that_were_made_and_see_them(
    make_harness: Callable[..., Harness], make_engine: Callable[..., Harness]
) -> None:
    heard = [listen(make()) for make in (make_engine, make_harness)]

    assert heard[0] == heard[1]
    steps = [event["step"] for event, _ in heard[0] if event["type"] == "step"]
    assert steps == list(range(1, 8))
    assert sum(preview is not None for _, preview in heard[0]) == 3


class Ear:
    """A listener that keeps what it hears, but where it stands in the queue."""

    preview_interval = 2

    def __init__(self) -> None:
        self.heard: list[tuple[dict[str, Any], bytes | None]] = []

    def on_event(self, event: dict[str, Any], preview: bytes | None) -> None:
        if event["type"] != "queued":
            self.heard.append((event, preview))


def listen(harness: Harness) -> list[tuple[dict[str, Any], bytes | None]]:
    ear, answer = Ear(), Future[Any]()
    fields = {"prompt": b"a cat", "seed": 5, "num_inference_steps": 7}
    harness.engine.ask(fields, answer.set_result, listener=ear)
    assert answer.result(WAIT_S).pictures
    return ear.heard


def test_batches_that_take_long_at_first_are_made_before_the_service_begins(
    make_harness: Callable[..., Harness], device: DeviceNetworks
) -> None:
    harness = make_harness(max_rows=16)
    assert harness.picture()

    default_width = harness.engine.limits.default_width // 8
    at_default_size = [rows for rows, width in device.blank_rows if width == default_width]
    # 40 rows are more than a call may have: what is prepared for them, 16 rows use. The largest
    # come first, whose memory is enough for the others.
    assert list(dict.fromkeys(at_default_size)) == [16, 3, 2]


def test_auto_rows_are_those_that_fit_into_the_devices_memory(
    make_harness: Callable[..., Harness], device: DeviceNetworks
) -> None:
    left = [1000.0]

    def available() -> int:
        left[0] *= 0.999
        return int(left[0])

    device.available_bytes = available
    assert make_harness(max_rows=None).picture()
    assert left[0] < 1000


def test_the_host_gives_what_it_was_given() -> None:
    array = np.arange(6.0).reshape(2, 3)

    assert HOST.from_host(array) is HOST.to_host(array) is HOST.fetch(array)() is array
    assert HOST.copy(array) is not array
    array[1, 2] = np.nan
    assert HOST.finite_rows(array).tolist() == [True, False]
