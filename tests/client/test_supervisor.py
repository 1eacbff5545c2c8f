"""What the supervisor does when, with a server that dies on command."""

from collections.abc import Iterator

import pytest
from fake_server import FakeServer

from darkroom.exceptions import QueueFull, RequestTimeout, ServerError
from darkroom.server import ServeError, ServeInterrupted
from darkroom.supervisor import Patience, Supervisor

HASTY = {"poll_s": 0.001, "probe_interval_s": 0.001, "retry_s": 0.001}
RARELY = {"poll_s": 0.001, "probe_interval_s": 1e9, "retry_s": 0.001}
UNRELIABLE = "unet failed: Stub process 'unet_0_0' is not healthy."


def supervise(server: FakeServer, **patience: float) -> None:
    Supervisor(server, server.told.append, Patience(**{**RARELY, **patience})).run()


def test_a_healthy_server_is_left_alone_and_nothing_is_told() -> None:
    def script(server: FakeServer) -> Iterator[None]:
        yield from server.until_probed(5)

    server = FakeServer(script)
    supervise(server, **HASTY, probe_timeout_s=7.0)

    assert (server.calls, server.told) == ([], [])
    assert set(server.probe_timeouts) == {7.0}


@pytest.mark.parametrize("model", ["unet", "darkroom"])
def test_what_no_client_waits_for_is_reloaded_once(model: str) -> None:
    def script(server: FakeServer) -> Iterator[None]:
        server.kill(model)
        yield from server.until_told("healed")
        for _ in range(5):
            yield

    server = FakeServer(script)
    supervise(server)

    assert server.calls == [f"reload {model}"]
    assert server.told[0] == f"{model} died; reloading it"
    assert server.told[1].startswith("healed in ")
    assert server.probe_timeouts == [server.start_timeout_s]


def test_networks_that_die_together_are_reloaded_together() -> None:
    def script(server: FakeServer) -> Iterator[None]:
        server.kill("unet", "vae_decoder", "unet")
        yield from server.until_told("healed")

    server = FakeServer(script)
    supervise(server)

    assert server.calls == ["reload unet", "reload vae_decoder"]


@pytest.mark.parametrize(
    "model", ["stable_diffusion", "stable_diffusion_stream", "stable_diffusion_cancel"]
)
def test_a_model_that_owes_answers_takes_the_server_with_it(model: str) -> None:
    def script(server: FakeServer) -> Iterator[None]:
        server.kill("unet", model)
        yield from server.until_told("healed")

    server = FakeServer(script)
    supervise(server)

    assert server.calls == ["restart"]
    assert server.told[0] == f"{model} died; restarting the server"


def test_a_server_that_ended_is_restarted() -> None:
    def script(server: FakeServer) -> Iterator[None]:
        server.end = "was killed by signal 9 (Killed)"
        yield from server.until_told("healed")

    server = FakeServer(script)
    supervise(server)

    assert server.calls == ["restart"]
    assert server.told[0] == "tritonserver was killed by signal 9 (Killed); restarting the server"


def test_a_network_that_cannot_be_reloaded_takes_the_server_with_it() -> None:
    def script(server: FakeServer) -> Iterator[None]:
        server.reload_failure = ServeError("unet cannot be loaded: no such file\nE1124 more")
        server.kill("unet")
        yield from server.until_told("healed")

    server = FakeServer(script)
    supervise(server)

    assert server.calls == ["reload unet", "restart"]
    assert server.told[1] == "unet cannot be loaded: no such file; restarting the server"


def test_a_network_that_keeps_dying_gives_way_to_a_restart() -> None:
    def script(server: FakeServer) -> Iterator[None]:
        for times in range(1, 5):
            server.kill("unet")
            yield from server.until_told("healed", times)

    server = FakeServer(script)
    supervise(server)

    assert server.calls == [*["reload unet"] * 3, "restart"]
    assert "unet died again after 3 reloads; restarting the server" in server.told


def test_a_server_that_keeps_dying_is_given_up_with_the_errors_of_its_log() -> None:
    def script(server: FakeServer) -> Iterator[None]:
        for times in range(1, 5):
            server.end = "ended with status 1"
            yield from server.until_told("healed", times)

    server = FakeServer(script)
    with pytest.raises(ServeError, match=r"status 1; giving up after 3 restarts .*\n.*last error"):
        supervise(server)

    assert server.calls == ["restart"] * 3


def test_a_restart_that_fails_is_tried_again() -> None:
    def script(server: FakeServer) -> Iterator[None]:
        server.restart_failure = ServeError("port 8001 is taken\nE1124 more")
        server.end = "ended with status 1"
        yield

    server = FakeServer(script)
    with pytest.raises(ServeError, match=r"^port 8001 is taken; giving up after 3 restarts"):
        supervise(server)

    assert server.calls == ["restart"] * 3
    assert server.told[1] == "port 8001 is taken; restarting the server"


def test_heals_with_health_between_them_are_never_too_many() -> None:
    def script(server: FakeServer) -> Iterator[None]:
        for times in range(1, 9):
            server.end = "ended with status 1"
            yield from server.until_told("healed", 2 * times - 1)
            server.kill("unet")
            yield from server.until_told("healed", 2 * times)

    server = FakeServer(script)
    supervise(server, healthy_s=0.0)

    assert server.calls == ["restart", "reload unet"] * 8


def test_a_probe_that_is_not_answered_in_time_means_a_restart() -> None:
    def script(server: FakeServer) -> Iterator[None]:
        server.probe_failure = RequestTimeout("Deadline Exceeded")
        yield from server.until_told("restarting")
        server.probe_failure = None
        yield from server.until_told("healed")

    server = FakeServer(script)
    supervise(server, **HASTY)

    assert server.calls == ["restart"]
    assert "no probe picture was made in time" in server.told[0]


def test_a_probe_that_fails_is_repeated_before_the_restart() -> None:
    def script(server: FakeServer) -> Iterator[None]:
        server.probe_failure = ServerError(UNRELIABLE)
        yield from server.until_told("restarting")
        server.probe_failure = None
        yield from server.until_told("healed")

    server = FakeServer(script)
    supervise(server, **HASTY)

    assert server.calls == ["restart"]
    assert server.told[:3] == [
        f"a probe picture failed: {UNRELIABLE} (1 of 3)",
        f"a probe picture failed: {UNRELIABLE} (2 of 3)",
        f"a probe picture failed: {UNRELIABLE}; restarting the server",
    ]


def test_a_probe_that_fails_now_and_then_means_nothing() -> None:
    def script(server: FakeServer) -> Iterator[None]:
        for times in range(1, 5):
            server.probe_failure = ServerError(UNRELIABLE)
            yield from server.until_told("failed", times)
            server.probe_failure = None
            # One of these may have been asked for before.
            yield from server.until_probed(2)

    server = FakeServer(script)
    supervise(server, **HASTY)

    assert server.calls == []


def test_a_full_queue_is_health() -> None:
    def script(server: FakeServer) -> Iterator[None]:
        server.probe_failure = QueueFull("the queue is full; retry_after_ms: 850")
        yield from server.until_probed(5)

    server = FakeServer(script)
    supervise(server, **HASTY)

    assert (server.calls, server.told) == ([], [])


def test_a_full_queue_does_not_show_that_a_heal_helped() -> None:
    def script(server: FakeServer) -> Iterator[None]:
        server.probe_failure = QueueFull("the queue is full; retry_after_ms: 850")
        server.kill("unet")
        yield from server.until_probed(3)
        assert server.told == ["unet died; reloading it"]
        server.probe_failure = None
        yield from server.until_told("healed")

    server = FakeServer(script)
    supervise(server)

    assert server.calls == ["reload unet"]


def test_a_heal_that_does_not_help_is_followed_by_a_restart() -> None:
    def script(server: FakeServer) -> Iterator[None]:
        server.probe_failure = ServerError(UNRELIABLE)
        server.kill("unet")
        yield from server.until_told("restarting")
        server.probe_failure = None
        yield from server.until_told("healed")

    server = FakeServer(script)
    supervise(server)

    assert server.calls == ["reload unet", "restart"]


@pytest.mark.parametrize("model", ["unet", "stable_diffusion"])
def test_a_stop_ends_a_heal(model: str) -> None:
    def script(server: FakeServer) -> Iterator[None]:
        server.reload_failure = server.restart_failure = ServeInterrupted("interrupted")
        server.kill(model)
        yield

    server = FakeServer(script)
    supervise(server)

    assert len(server.calls) == 1
