"""Several engines that answer as one: who gets a request, and what they say together."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from typing import Any

import pytest
from engine_harness import WAIT_S
from fake_networks import FakeNetworks

from darkroom_engine import (
    Cancelled,
    Engine,
    EngineConfig,
    EngineError,
    Fleet,
    ImageRequest,
    InvalidRequest,
    Job,
    JobResult,
    Manifest,
    NetworkFailed,
    Overloaded,
)
from darkroom_engine.metrics import (
    IMAGES,
    MAX_ROWS,
    REQUESTS,
    RUNNING,
    WAITING,
    Metric,
)


class Ledger:
    """Counters added up, and gauges as they were last set."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.counts: dict[tuple[str, str], float] = {}
        self.gauges: dict[str, float] = {}

    def record(self, metric: Metric, value: float, label: str = "") -> None:
        with self._lock:
            if metric.kind == "GAUGE":
                self.gauges[metric.name] = value
            elif metric.kind == "COUNTER":
                key = metric.name, label
                self.counts[key] = self.counts.get(key, 0) + value


class Squad:
    """A fleet with its fake networks, one set an engine."""

    def __init__(self, manifest: Manifest, networks: list[FakeNetworks], config: EngineConfig):
        self.networks = networks
        self.ledger = Ledger()
        self.engines: list[Engine] = []
        self.is_warm = threading.Event()
        self.num_warm = 0

        def make_engine(number: int, record: Any, **told: Callable[[], None]) -> Engine:
            engine = Engine(manifest, networks[number], config, record, **told)
            self.engines.append(engine)
            return engine

        self.fleet = Fleet(make_engine, len(networks), self.ledger.record, on_warm=self._warm)

    def _warm(self) -> None:
        self.num_warm += 1
        self.is_warm.set()

    def ask(self, prompt: str = "a cat", **fields: Any) -> "Future[JobResult]":
        return self.ask_job(prompt, **fields)[1]

    def ask_job(
        self, prompt: str = "a cat", request_id: str = "", **fields: Any
    ) -> "tuple[Job, Future[JobResult]]":
        raw: Mapping[str, Any] = {"prompt": prompt.encode(), "seed": 0, **fields}
        request = ImageRequest.parse(raw, self.fleet.limits)
        future, reply = promise()
        return self.fleet.submit(request, reply, request_id=request_id), future

    def loads(self) -> list[int]:
        """The requests in flight of each engine."""
        return [len(engine.jobs) for engine in self.engines]

    def close_gates(self) -> None:
        for networks in self.networks:
            networks.is_entered.clear()
            networks.gate.clear()

    def wait_until_stepping(self) -> None:
        """Returns when each engine is in a step, so that what is in that waits no more."""
        for networks in self.networks:
            assert networks.is_entered.wait(WAIT_S)

    def open_gates(self) -> None:
        for networks in self.networks:
            networks.gate.set()


def promise() -> "tuple[Future[JobResult], Callable[[JobResult | EngineError], None]]":
    """An answer to come, and what takes it."""
    future: Future[JobResult] = Future()

    def reply(answer: JobResult | EngineError) -> None:
        if isinstance(answer, JobResult):
            future.set_result(answer)
        else:
            future.set_exception(answer)

    return future, reply


Muster = Callable[..., Squad]


@pytest.fixture
def muster(manifest: Manifest) -> Iterator[Muster]:
    """Makes and starts a fleet; `prepare` is given its networks before."""
    squads: list[Squad] = []

    def muster(
        num_engines: int = 2,
        prepare: Callable[[list[FakeNetworks]], None] = lambda _: None,
        **config: Any,
    ) -> Squad:
        networks = [FakeNetworks() for _ in range(num_engines)]
        prepare(networks)
        squad = Squad(manifest, networks, EngineConfig(**config))
        squads.append(squad)
        squad.fleet.start()
        return squad

    yield muster
    for squad in squads:
        squad.open_gates()
        squad.fleet.close()


@pytest.fixture
def squad(muster: Muster) -> Squad:
    """Two warm engines, which have not timed any step yet: rows are what they compare."""
    squad = muster(warmup_rows=0)
    assert squad.is_warm.wait(WAIT_S)
    return squad


def test_requests_are_spread(squad: Squad) -> None:
    squad.close_gates()
    futures = [squad.ask(str(n)) for n in range(6)]

    assert squad.loads() == [3, 3]
    squad.open_gates()
    for future in futures:
        future.result(WAIT_S)
    assert all(networks.step_rows for networks in squad.networks)


def test_pictures_are_those_of_one_engine(muster: Muster, squad: Squad) -> None:
    alone = muster(num_engines=1)
    prompts = [str(n) for n in range(4)]
    expected = [alone.ask(prompt).result(WAIT_S).pictures for prompt in prompts]

    futures = [squad.ask(prompt) for prompt in prompts]

    assert [future.result(WAIT_S).pictures for future in futures] == expected


def test_the_one_with_least_left_to_do_is_chosen(squad: Squad) -> None:
    squad.close_gates()
    squad.ask("long", num_inference_steps=50)
    squad.ask("short", num_inference_steps=2)
    squad.ask("short too", num_inference_steps=2)

    assert squad.loads() == [1, 2]
    assert [engine.work.seconds for engine in squad.engines] == [0, 0]
    assert [engine.work.row_steps for engine in squad.engines] == [100, 8]


def test_the_one_that_is_done_soonest_is_chosen_once_steps_were_timed(squad: Squad) -> None:
    squad.close_gates()
    for engine, seconds in zip(squad.engines, (1.0, 0.1), strict=True):
        engine._pace.record_step((4, 8, 8), 16, seconds)
    for _ in range(4):
        squad.ask(num_inference_steps=8)

    assert squad.loads() == [1, 3]
    first, second = (engine.work.seconds for engine in squad.engines)
    assert (first, second) == pytest.approx((1.0, 0.3))


def test_all_pictures_of_a_request_are_made_in_one_place(squad: Squad) -> None:
    assert len(squad.ask(num_images_per_prompt=4).result(WAIT_S).pictures) == 4

    assert [bool(networks.step_rows) for networks in squad.networks] == [True, False]


@pytest.fixture
def full(muster: Muster) -> tuple[Squad, list["Future[JobResult]"]]:
    """One request runs and one waits, which are all that may, in the second engine first."""
    squad = muster(max_queue_size=1, max_rows=2, warmup_rows=0)
    assert squad.is_warm.wait(WAIT_S)
    squad.close_gates()
    futures = [squad.ask("long", num_inference_steps=60), squad.ask("short")]
    squad.wait_until_stepping()
    futures.append(squad.ask("short too"))
    assert squad.loads() == [1, 2]
    # There is less left to do in the second one still, but no room.
    futures.append(squad.ask("beside the long one"))
    assert squad.loads() == [2, 2]
    return squad, futures


def test_overload_is_passed_on_and_then_told(
    full: tuple[Squad, list["Future[JobResult]"]],
) -> None:
    squad, futures = full

    with pytest.raises(Overloaded, match="the queue is full: 1 pictures are waiting, 1 may wait"):
        squad.ask()
    squad.open_gates()
    for future in futures:
        assert future.result(WAIT_S).pictures


def test_the_shortest_of_several_waits_is_told(
    full: tuple[Squad, list["Future[JobResult]"]],
) -> None:
    squad, _ = full
    for engine in squad.engines:
        engine._pace.record_step((4, 8, 8), 2, 1.0)
    waits = []
    for engine in squad.engines:
        with pytest.raises(Overloaded) as caught:
            engine.submit(request_of(squad), print)
        waits.append(caught.value.retry_after_s)

    with pytest.raises(Overloaded) as caught:
        squad.ask()
    assert waits == pytest.approx([34.0, 8.0])
    assert caught.value.retry_after_s == pytest.approx(8.0)


def request_of(squad: Squad, **fields: Any) -> ImageRequest:
    return ImageRequest.parse({"prompt": b"a cat", **fields}, squad.fleet.limits)


def test_what_no_engine_could_take_is_the_callers_mistake(muster: Muster) -> None:
    squad = muster(max_queue_size=2)

    with pytest.raises(InvalidRequest, match="num_images_per_prompt: 3 are more than may wait"):
        squad.ask(num_images_per_prompt=3)


def test_asking_answers_every_refusal(muster: Muster) -> None:
    squad = muster(max_queue_size=1)
    for fields, error in (
        ({"prompt": b"a cat", "width": 7}, "width: 7 is"),
        ({"prompt": b"a cat", "num_images_per_prompt": 2}, "num_images_per_prompt: 2 are more"),
    ):
        future, reply = promise()
        squad.fleet.ask(fields, reply, request_id="it")

        with pytest.raises(EngineError, match=error):
            future.result(WAIT_S)
    future, reply = promise()
    squad.fleet.ask({"prompt": b"a cat"}, reply)
    assert future.result(WAIT_S).pictures
    assert sum(
        count for (name, _), count in squad.ledger.counts.items() if name == REQUESTS.name
    ) == len(("width", "several", "image"))


def test_a_surprise_is_answered_too(squad: Squad) -> None:
    class Hostile(dict[str, Any]):
        def get(self, *_: Any) -> Any:
            raise LookupError("surprise")

        def __contains__(self, _: object) -> bool:
            raise LookupError("surprise")

        def __iter__(self) -> Any:
            raise LookupError("surprise")

    future, reply = promise()
    squad.fleet.ask(Hostile(), reply)

    with pytest.raises(EngineError, match="this is a bug: LookupError"):
        future.result(WAIT_S)


def test_a_request_is_cancelled_wherever_it_is(squad: Squad) -> None:
    squad.close_gates()
    futures = {name: squad.ask_job(name, request_id=name)[1] for name in ("one", "two")}
    assert squad.loads() == [1, 1]

    for name, future in futures.items():
        assert squad.fleet.cancel(name)
        with pytest.raises(Cancelled):
            future.result(WAIT_S)
    assert not squad.fleet.cancel("one")
    assert not squad.fleet.cancel("three")


def test_an_id_that_two_engines_know_cancels_neither(squad: Squad) -> None:
    squad.close_gates()
    futures = [squad.ask_job("a cat", request_id="same")[1] for _ in range(2)]
    assert squad.loads() == [1, 1]

    with pytest.raises(InvalidRequest, match="request_id: 'same' names 2 requests"):
        squad.fleet.cancel("same")
    squad.open_gates()
    for future in futures:
        assert future.result(WAIT_S).pictures


def test_an_engine_that_could_not_start_gets_nothing(muster: Muster) -> None:
    def lose_the_first(networks: list[FakeNetworks]) -> None:
        networks[0].is_missing = True

    squad = muster(3, lose_the_first, warmup_rows=0)
    assert squad.is_warm.wait(WAIT_S)
    squad.close_gates()
    futures = [squad.ask() for _ in range(4)]

    assert squad.loads() == [0, 2, 2]
    squad.open_gates()
    for future in futures:
        assert future.result(WAIT_S).pictures


def test_an_engine_that_fails_last_does_not_keep_the_others_from_being_ready(
    muster: Muster,
) -> None:
    def load_the_second_for_ever(networks: list[FakeNetworks]) -> None:
        networks[1].is_loading = True

    squad = muster(2, load_the_second_for_ever)
    # One that is not warm yet gets requests only where no other can have them.
    assert squad.ask().result(WAIT_S).pictures
    squad.close_gates()
    futures = [squad.ask() for _ in range(3)]

    assert squad.loads() == [3, 0]
    assert not squad.is_warm.is_set()
    squad.networks[1].is_missing = True
    squad.networks[1].is_loading = False
    assert squad.is_warm.wait(WAIT_S)
    squad.open_gates()
    for future in futures:
        assert future.result(WAIT_S).pictures
    assert squad.num_warm == 1


def test_requests_are_taken_before_any_engine_is_warm(muster: Muster) -> None:
    def close(networks: list[FakeNetworks]) -> None:
        for it in networks:
            it.gate.clear()

    squad = muster(2, close)
    futures = [squad.ask() for _ in range(4)]

    assert squad.loads() == [2, 2]
    squad.open_gates()
    for future in futures:
        assert future.result(WAIT_S).pictures


def test_if_none_could_start_the_reason_is_told(muster: Muster) -> None:
    def lose_all(networks: list[FakeNetworks]) -> None:
        for it in networks:
            it.is_missing = True

    squad = muster(2, lose_all)

    # The first may come before or after the engines know.
    with pytest.raises(NetworkFailed, match="unet failed: not ready within"):
        squad.ask().result(WAIT_S)
    for _ in range(2):
        with pytest.raises(NetworkFailed, match="unet failed: not ready within"):
            squad.ask().result(WAIT_S)
    assert not squad.is_warm.is_set()


def test_closing_answers_all(squad: Squad) -> None:
    squad.close_gates()
    futures = [squad.ask() for _ in range(5)]
    squad.wait_until_stepping()
    closing = threading.Thread(target=squad.fleet.close)
    closing.start()
    give_up_at = time.monotonic() + WAIT_S
    while not all(engine._is_closing for engine in squad.fleet._engines):
        assert time.monotonic() < give_up_at
        time.sleep(0.001)
    squad.open_gates()
    closing.join(WAIT_S)

    assert not closing.is_alive()
    for future in futures:
        with pytest.raises(EngineError, match="the engine is stopping"):
            future.result(WAIT_S)
    with pytest.raises(EngineError, match="the engine is stopping"):
        squad.ask()


def test_gauges_are_sums_and_counts_add_up(squad: Squad) -> None:
    assert squad.ledger.gauges[MAX_ROWS.name] == 32
    squad.close_gates()
    futures = [squad.ask(num_images_per_prompt=2) for _ in range(3)]

    squad.wait_until_stepping()
    assert squad.loads() == [2, 1]
    assert squad.ledger.gauges[WAITING.name] + squad.ledger.gauges.get(RUNNING.name, 0) == 6
    squad.open_gates()
    for future in futures:
        future.result(WAIT_S)
    squad.fleet.close()
    assert squad.ledger.counts[REQUESTS.name, "image"] == 3
    assert squad.ledger.counts[IMAGES.name, ""] == 6
    assert squad.ledger.gauges[WAITING.name] == 0
    assert squad.ledger.gauges[RUNNING.name] == 0


def test_a_fleet_of_one_is_its_engine(muster: Muster) -> None:
    squad = muster(num_engines=1)
    assert squad.is_warm.wait(WAIT_S)
    (engine,) = squad.engines

    assert squad.fleet.limits is engine.limits
    assert squad.fleet.describe() == engine.describe()
    assert squad.ledger.gauges[MAX_ROWS.name] == 16
    assert squad.ask().result(WAIT_S).pictures


def test_engines_that_share_networks_cannot_load_and_unload_them() -> None:
    with pytest.raises(ValueError, match="num_engines: 2 engines share what is loaded, which they"):
        EngineConfig(num_engines=2, memory_profile="low")
