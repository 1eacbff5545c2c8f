"""When networks are loaded and unloaded, under each memory profile."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from engine_harness import Harness
from fake_model_control import FakeServer
from fake_networks import FakeNetworks

from darkroom_engine import EngineConfig
from darkroom_engine.errors import NetworkFailed
from darkroom_engine.manifest import Manifest
from darkroom_engine.profiles import MemoryProfile, Residence, TransientNetworks

WAIT_S = 30.0
X = np.zeros((1, 2), np.float32)
NAMES = ("text_encoder", "unet", "vae_decoder", "vae_encoder", "safety_checker", "controlnet_a")
NEVER: dict[str, Any] = {"idle_s": 1e6, "linger_s": 1e6, "min_turn_s": 1e6}
"""Nothing is done because time has passed."""


@pytest.fixture
def large(manifest: Manifest) -> Manifest:
    """A checkpoint with all kinds of networks."""
    record = manifest.networks["unet"]
    names = (*NAMES, "unet_watercolor", "text_encoder_watercolor")
    return replace(
        manifest,
        networks=dict.fromkeys(names, record),
        controlnets={"a": "controlnet_a"},
        variants={"watercolor": {name: f"{name}_watercolor" for name in ("unet", "text_encoder")}},
        safety_checker={"network": "safety_checker"},
    )


@pytest.fixture
def server() -> FakeServer:
    return FakeServer()


Make = Callable[..., TransientNetworks]


@pytest.fixture
def make(large: Manifest, server: FakeServer) -> Iterator[Make]:
    made: list[TransientNetworks] = []

    def make(profile: str, **times: Any) -> TransientNetworks:
        residence = replace(Residence.of(MemoryProfile(profile), large), **{**NEVER, **times})
        networks = TransientNetworks(server, server, residence)
        made.append(networks)
        networks.wait_until_ready(NAMES, 1.0, lambda: False)
        return networks

    yield make
    for networks in made:
        networks.close()


@pytest.fixture
def is_enough() -> threading.Event:
    """Ends what goes on and on."""
    return threading.Event()


@pytest.fixture
def pool(server: FakeServer, is_enough: threading.Event) -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as pool:
        yield pool
        is_enough.set()
        server.load_gate.set()
        for gate in server.call_gates.values():
            gate.set()


def call(networks: TransientNetworks, *names: str) -> None:
    for name in names:
        assert networks.run(name, {"x": X}, ["y"])[0] is X


def wait_until(is_so: Callable[[], bool]) -> None:
    give_up_at = time.monotonic() + WAIT_S
    while not is_so():
        assert time.monotonic() < give_up_at, "it never came to be so"
        time.sleep(0.002)


class TestResidence:
    def test_under_full_everything_stays(self, large: Manifest) -> None:
        residence = Residence.of(MemoryProfile.FULL, large)

        assert residence.stays == set(large.networks)

    def test_under_balanced_the_denoiser_and_the_decoder_stay(self, large: Manifest) -> None:
        residence = Residence.of(MemoryProfile.BALANCED, large)

        assert residence.stays == {"unet", "vae_decoder"}
        assert not residence.exclude("text_encoder", "vae_encoder")

    def test_under_low_only_those_are_together_that_are_called_by_turns(
        self, large: Manifest
    ) -> None:
        residence = Residence.of(MemoryProfile.LOW, large)
        names = sorted(large.networks)
        together = {
            (one, other)
            for one in names
            for other in names
            if one < other and not residence.exclude(one, other)
        }

        assert residence.stays == frozenset()
        assert together == {
            ("controlnet_a", "unet"),
            ("controlnet_a", "unet_watercolor"),
            ("safety_checker", "vae_decoder"),
        }


class TestLow:
    def test_one_after_the_other_is_loaded(self, make: Make, server: FakeServer) -> None:
        networks = make("low")
        call(networks, "text_encoder", "unet", "unet", "vae_decoder", "vae_decoder")

        assert server.told == [
            *("+text_encoder", "text_encoder", "-text_encoder"),
            *("+unet", "unet", "unet", "-unet"),
            *("+vae_decoder", "vae_decoder", "vae_decoder"),
        ]
        assert server.most_loaded == 1

    def test_a_controlnet_stays_beside_the_denoiser(self, make: Make, server: FakeServer) -> None:
        networks = make("low")
        call(networks, *["controlnet_a", "unet"] * 3, "vae_decoder")

        loads = [entry for entry in server.told if entry[0] in "+-"]
        assert loads == ["+controlnet_a", "+unet", "-controlnet_a", "-unet", "+vae_decoder"]

    def test_what_an_earlier_engine_left_is_unloaded_first(
        self, make: Make, server: FakeServer
    ) -> None:
        server.loaded = {"unet", "vae_decoder"}
        make("low")

        assert server.loaded == set()

    def test_a_decode_waits_while_steps_go_on_and_gets_its_turn(
        self, make: Make, server: FakeServer, pool: ThreadPoolExecutor, is_enough: threading.Event
    ) -> None:
        """The steps never pause, and the decode comes all the same, and then steps again."""
        networks = make("low", min_turn_s=0.05, linger_s=0.02)

        def step_on() -> None:
            while not is_enough.is_set():
                call(networks, "unet")

        steps = pool.submit(step_on)
        for _ in range(3):
            wait_until(lambda: "unet" in server.loaded)
            pool.submit(call, networks, "vae_decoder").result(WAIT_S)
        wait_until(lambda: "unet" in server.loaded)
        is_enough.set()
        steps.result(WAIT_S)

        assert server.most_loaded == 1
        assert server.told.count("vae_decoder") == 3

    def test_two_that_never_pause_take_turns_of_more_than_one_call(
        self, make: Make, server: FakeServer, pool: ThreadPoolExecutor, is_enough: threading.Event
    ) -> None:
        networks = make("low", min_turn_s=0.05)

        def again_and_again(name: str) -> None:
            while not is_enough.is_set():
                call(networks, name)

        loops = [pool.submit(again_and_again, name) for name in ("unet", "vae_decoder")]
        wait_until(lambda: server.told.count("+vae_decoder") > 2)
        is_enough.set()
        for loop in loops:
            loop.result(WAIT_S)

        assert server.most_loaded == 1
        changes = sum(entry.startswith("+") for entry in server.told)
        assert len(server.told) > 20 * changes

    def test_one_whose_caller_waits_itself_gives_way_at_once(
        self, make: Make, server: FakeServer, pool: ThreadPoolExecutor
    ) -> None:
        """Steps need a prompt: while their thread waits, who waits longer gets the turn."""
        networks = make("low")
        with ThreadPoolExecutor(1) as engine:
            engine.submit(call, networks, "unet").result(WAIT_S)
            decode = pool.submit(call, networks, "vae_decoder")
            wait_until(lambda: len(networks._waiting) == 1)
            assert server.loaded == {"unet"}

            encode = engine.submit(call, networks, "text_encoder")
            decode.result(WAIT_S)
            # Nobody knows that the decoder's thread is done with it.
            assert not encode.done()
            networks._residence = replace(networks._residence, linger_s=0.0)
            encode.result(WAIT_S)
        assert server.most_loaded == 1

    def test_an_idle_one_gives_way(
        self, make: Make, server: FakeServer, pool: ThreadPoolExecutor
    ) -> None:
        networks = make("low", linger_s=0.01)
        call(networks, "unet")
        pool.submit(call, networks, "vae_decoder").result(WAIT_S)

        assert server.loaded == {"vae_decoder"}

    def test_one_whose_caller_rests_gives_way_at_once(
        self, make: Make, server: FakeServer, pool: ThreadPoolExecutor
    ) -> None:
        networks = make("low")
        call(networks, "unet")
        decode = pool.submit(call, networks, "vae_decoder")
        wait_until(lambda: len(networks._waiting) == 1)
        assert server.loaded == {"unet"}
        networks.rest()
        decode.result(WAIT_S)

        assert server.loaded == {"vae_decoder"}

    def test_who_calls_again_rests_no_longer(
        self, make: Make, server: FakeServer, pool: ThreadPoolExecutor
    ) -> None:
        networks = make("low")
        networks.rest()
        call(networks, "unet")
        decode = pool.submit(call, networks, "vae_decoder")
        wait_until(lambda: len(networks._waiting) == 1)
        call(networks, "unet")
        assert server.loaded == {"unet"}

        networks.rest()
        decode.result(WAIT_S)

    def test_a_running_call_is_waited_for(
        self, make: Make, server: FakeServer, pool: ThreadPoolExecutor
    ) -> None:
        networks = make("low", min_turn_s=0.01)
        gate = server.call_gates["unet"] = threading.Event()
        step = pool.submit(call, networks, "unet")
        wait_until(lambda: "unet" in server.running)
        decode = pool.submit(call, networks, "vae_decoder")
        wait_until(lambda: networks._leaving == ["unet"])
        # It is going to leave: who comes now waits for its return.
        next_step = pool.submit(call, networks, "unet")
        gate.set()
        networks._residence = replace(networks._residence, linger_s=0.0)
        for future in (step, decode, next_step):
            future.result(WAIT_S)

        assert server.told[:5] == ["+unet", "unet", "-unet", "+vae_decoder", "vae_decoder"]
        assert server.most_loaded == 1

    def test_a_change_is_due_when_the_last_one_has_paid_off(self, make: Make) -> None:
        networks = make("low")
        assert networks.is_change_due()
        call(networks, "unet")
        assert not networks.is_change_due()
        networks._residence = replace(networks._residence, min_turn_s=0.0)
        wait_until(networks.is_change_due)


class TestBalanced:
    def test_what_stays_is_loaded_once_and_others_beside_it(
        self, make: Make, server: FakeServer
    ) -> None:
        networks = make("balanced", idle_s=0.02)
        call(networks, "unet", "vae_decoder", "text_encoder", "unet")
        wait_until(lambda: server.loaded == {"unet", "vae_decoder"})
        call(networks, "unet", "vae_decoder")

        loads = [entry for entry in server.told if entry[0] in "+-"]
        assert loads == ["+unet", "+vae_decoder", "+text_encoder", "-text_encoder"]

    def test_calls_go_on_while_another_network_is_loaded(
        self, make: Make, server: FakeServer, pool: ThreadPoolExecutor
    ) -> None:
        networks = make("balanced")
        call(networks, "unet")
        server.load_gate.clear()
        encode = pool.submit(call, networks, "text_encoder")
        wait_until(lambda: networks._is_changing)
        call(networks, "unet", "unet")
        assert not encode.done()

        server.load_gate.set()
        encode.result(WAIT_S)

    def test_two_callers_of_one_network_load_it_once(
        self, make: Make, server: FakeServer, pool: ThreadPoolExecutor
    ) -> None:
        networks = make("balanced")
        server.load_gate.clear()
        calls = [pool.submit(call, networks, "text_encoder") for _ in range(2)]
        wait_until(lambda: len(networks._waiting) == 2)
        server.load_gate.set()
        for future in calls:
            future.result(WAIT_S)

        assert sorted(server.told) == ["+text_encoder", "text_encoder", "text_encoder"]

    def test_one_that_is_called_is_not_idle(
        self, make: Make, server: FakeServer, pool: ThreadPoolExecutor
    ) -> None:
        networks = make("balanced", idle_s=0.02)
        gate = server.call_gates["text_encoder"] = threading.Event()
        encode = pool.submit(call, networks, "text_encoder")
        wait_until(lambda: "text_encoder" in server.running)
        call(networks, "vae_encoder")
        wait_until(lambda: "-vae_encoder" in server.told)
        assert "text_encoder" in server.loaded

        gate.set()
        encode.result(WAIT_S)
        wait_until(lambda: server.loaded == set())

    def test_a_change_is_always_due(self, make: Make) -> None:
        networks = make("balanced")
        call(networks, "unet")

        assert networks.is_change_due()


@pytest.mark.parametrize("profile", ["balanced", "low"])
class TestFailures:
    def test_a_failed_load_is_the_callers_and_later_ones_succeed(
        self, make: Make, server: FakeServer, profile: str
    ) -> None:
        networks = make(profile)
        call(networks, "text_encoder")
        server.fails["unet"] = "no memory"
        for _ in range(2):
            with pytest.raises(NetworkFailed, match="unet failed: no memory"):
                call(networks, "unet")
        call(networks, "text_encoder", "vae_decoder")
        del server.fails["unet"]
        call(networks, "unet")

        assert server.told[-1] == "unet"

    def test_a_failed_load_lets_others_in_that_wait(
        self, make: Make, server: FakeServer, pool: ThreadPoolExecutor, profile: str
    ) -> None:
        networks = make(profile)
        server.fails["unet"] = "no memory"
        server.load_gate.clear()
        futures: list[Future[Any]] = []
        for name in ("unet", "vae_decoder", "unet"):
            futures.append(pool.submit(call, networks, name))
            wait_until(lambda: len(networks._waiting) == len(futures))
        networks._residence = replace(networks._residence, linger_s=0.0)
        server.load_gate.set()

        assert isinstance(futures[0].exception(WAIT_S), NetworkFailed)
        assert futures[1].exception(WAIT_S) is None
        assert isinstance(futures[2].exception(WAIT_S), NetworkFailed)

    def test_a_failed_call_counts_as_one_that_is_over(
        self, make: Make, server: FakeServer, profile: str
    ) -> None:
        networks = make(profile, idle_s=0.02)

        def fail(network: str) -> None:
            server.running.discard(network)
            raise NetworkFailed(network, "its process died")

        server.on_call = fail
        with pytest.raises(NetworkFailed, match="its process died"):
            call(networks, "text_encoder")
        wait_until(lambda: server.loaded == set())

    def test_one_that_somebody_else_unloaded_is_back_after_a_call(
        self, make: Make, server: FakeServer, profile: str
    ) -> None:
        networks = make(profile)
        call(networks, "unet")

        def fail_unless_loaded(network: str, inputs: Any, _: Any) -> list[np.ndarray]:
            if server.told[-2:-1] != [f"+{network}"]:
                raise NetworkFailed(network, "not ready")
            return [inputs["x"]]

        server.answer = fail_unless_loaded
        with pytest.raises(NetworkFailed, match="not ready"):
            call(networks, "unet")
        call(networks, "unet")

        assert server.told == ["+unet", "unet", "unet", "+unet", "unet"]

    def test_one_that_cannot_be_unloaded_is_tried_again(
        self, make: Make, server: FakeServer, profile: str
    ) -> None:
        networks = make(profile, idle_s=0.02)
        server.fails["-text_encoder"] = "it stays"
        call(networks, "text_encoder")
        call(networks, "text_encoder")
        del server.fails["-text_encoder"]
        wait_until(lambda: server.loaded == set())

        assert server.told == ["+text_encoder", "text_encoder", "text_encoder", "-text_encoder"]

    def test_a_server_that_is_not_ready_is_told(
        self, large: Manifest, server: FakeServer, profile: str
    ) -> None:
        residence = Residence.of(MemoryProfile(profile), large)
        networks = TransientNetworks(server, server, residence)
        with pytest.raises(NetworkFailed, match="not ready"):
            networks.wait_until_ready(NAMES, 1.0, lambda: True)
        networks.close()


def test_what_is_in_the_way_and_cannot_leave_fails_the_caller(
    make: Make, server: FakeServer
) -> None:
    networks = make("low")
    call(networks, "text_encoder")
    server.fails["-text_encoder"] = "it stays"
    with pytest.raises(NetworkFailed, match="text_encoder failed: it stays"):
        call(networks, "unet")
    call(networks, "text_encoder")
    del server.fails["-text_encoder"]
    call(networks, "unet")

    assert server.loaded == {"unet"}


@pytest.mark.parametrize("profile", ["balanced", "low"])
def test_an_engine_makes_the_same_pictures_and_none_waits_for_ever(
    manifest: Manifest, make_engine: Callable[..., Harness], server: FakeServer, profile: str
) -> None:
    """Requests of all lengths, whose prompts, steps and decodes push each other out."""
    requests = [
        {"prompt": f"cat number {number}", "seed": number, "num_inference_steps": 1 + 5 * number}
        for number in range(6)
    ]
    plain = make_engine()
    expected = [plain.picture(**request) for request in requests]
    server.answer = FakeNetworks().run
    residence = replace(
        Residence.of(MemoryProfile(profile), manifest), idle_s=0.02, linger_s=0.005, min_turn_s=0.02
    )
    networks = TransientNetworks(server, server, residence)
    harness = Harness(manifest, networks, EngineConfig())
    harness.engine.start()
    try:
        futures = [harness.ask(**request) for request in requests]
        made = [future.result(WAIT_S).pictures[0] for future in futures]
    finally:
        harness.engine.close()
        networks.close()

    assert made == expected
    if profile == "low":
        assert server.most_loaded == 1
