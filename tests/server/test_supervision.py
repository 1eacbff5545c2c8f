"""Processes are killed under `darkroom serve`: nobody waits in vain, later requests succeed."""

import contextlib
import json
import os
import re
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from serving import (
    WAIT_S,
    Serving,
    are_gone,
    server_processes,
    serving,
    shm_regions,
    wait_until,
    wait_until_stepping,
)

from darkroom import Client, DarkroomError, Picture
from darkroom.cli import main
from darkroom.server import Server, free_ports
from darkroom.supervisor import Patience, Supervisor

SIZE = 256


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as pool:
        yield pool


def ask(
    pool: ThreadPoolExecutor, served: Serving | Server, size: int = SIZE
) -> list[Future[Picture]]:
    """Long requests over gRPC and HTTP; returns when they are being worked on."""

    def generate(url: str, seed: int) -> Picture:
        with Client(url, timeout=WAIT_S) as client:
            return client.generate(
                "a red circle", seed=seed, num_inference_steps=150, width=size, height=size
            )

    urls = [served.grpc_url, served.http_url] * 2
    requests = [pool.submit(generate, url, seed) for seed, url in enumerate(urls)]
    wait_until_stepping(served.grpc_url)
    return requests


def a_picture(served: Serving | Server) -> Picture:
    with Client(served.grpc_url, timeout=WAIT_S) as client:
        return client.generate("a red circle", num_inference_steps=2)


def stop(served: Serving) -> None:
    """Nothing is left: no process of now or before, no shared memory, no file."""
    processes = served.processes()
    served.process.send_signal(signal.SIGTERM)
    assert served.process.wait(WAIT_S) == 0
    wait_until(lambda: are_gone(processes))
    assert shm_regions(served.process.pid) == []


@pytest.mark.parametrize("network", ["unet", "vae_decoder"])
def test_requests_outlive_the_process_of_a_network(
    repository: Path, pool: ThreadPoolExecutor, network: str
) -> None:
    with serving(repository) as served:
        before = served.processes()
        requests = ask(pool, served, size=128)
        served.kill(network)
        served.wait_until_told(f"^{network} died; reloading it$")
        served.wait_until_told(r"^healed in \d+\.\d s$")

        assert all(request.result(WAIT_S).size for request in requests)
        assert a_picture(served).size
        after = served.processes()
        assert after.keys() == before.keys()
        assert {name for name in after if after[name] != before[name]} == {network}
        stop(served)


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("stable_diffusion", "stable_diffusion died"),
        ("tritonserver", r"tritonserver was killed by signal 9 \(Killed\)"),
    ],
)
def test_what_owes_answers_is_killed_and_clients_get_an_error_not_silence(
    repository: Path, pool: ThreadPoolExecutor, name: str, cause: str
) -> None:
    with serving(repository) as served:
        before = served.processes()
        requests = ask(pool, served)
        served.kill(name)

        for request in requests:
            assert isinstance(request.exception(WAIT_S), DarkroomError)
        served.wait_until_told(f"^{cause}; restarting the server$")
        served.wait_until_told("^healed in")
        assert a_picture(served).size
        assert served.processes().keys() == before.keys()
        assert are_gone(before)
        stop(served)


def test_every_model_that_answers_clients_is_watched(repository: Path) -> None:
    with serving(repository) as served:
        names = [name for name in served.processes() if name.startswith("stable_diffusion_")]
        for times, name in enumerate(names, 1):
            served.kill(name)
            served.wait_until_told(f"^{name} died; restarting the server$")
            served.wait_until_told("^healed in", times)
        stop(served)


def test_a_server_that_keeps_dying_is_given_up(repository: Path) -> None:
    with serving(repository) as served:
        for times in range(1, 4):
            served.kill("tritonserver")
            served.wait_until_told("^healed in", times)
        served.kill("tritonserver")

        assert served.process.wait(WAIT_S) == 1
        served.wait_until_told("^darkroom: tritonserver was killed .* giving up after 3 restarts")
        assert served.processes() == {}


@pytest.mark.parametrize("name", ["unet", "stable_diffusion", "tritonserver"])
def test_a_signal_while_it_heals_stops_cleanly(
    repository: Path, pool: ThreadPoolExecutor, name: str
) -> None:
    with serving(repository) as served:
        requests = ask(pool, served)
        served.kill(name)
        served.wait_until_told(" died| was killed")
        stop(served)

        for request in requests:
            assert isinstance(request.exception(WAIT_S), DarkroomError) or request.result().size
        assert served.told[-1] == "stopping"


@contextlib.contextmanager
def supervised(server: Server, **patience: float) -> Iterator[list[str]]:
    """A supervisor in this program; yields the lines that it tells."""
    told: list[str] = []
    supervisor = Supervisor(server, told.append, Patience(**patience))
    thread = threading.Thread(target=supervisor.run)
    thread.start()
    try:
        yield told
    finally:
        server.is_stopping = True
        thread.join()


def test_a_planned_unload_is_no_death(repository: Path) -> None:
    """Somebody loads a changed network; the supervisor does not get in the way."""
    with (
        Server(repository, free_ports()) as server,
        supervised(server, poll_s=0.01, probe_interval_s=1e6) as told,
    ):
        for _ in range(3):
            before = server_processes(server.ports)
            server.reload("vae_decoder")
            wait_until(lambda former=before: are_gone({"it": former["vae_decoder"]}))
        assert a_picture(server).size
    assert told == []


@pytest.mark.parametrize("name", ["tritonserver", "unet"])
def test_what_hangs_is_restarted(repository: Path, name: str) -> None:
    with (
        Server(repository, free_ports()) as server,
        supervised(server, probe_interval_s=0.1, probe_timeout_s=10.0) as told,
    ):
        os.kill(server_processes(server.ports)[name], signal.SIGSTOP)
        wait_until(lambda: any(line.startswith("healed") for line in told))

        assert a_picture(server).size
    # Triton has an error for what comes to a process that hangs, but not for what it is at.
    causes = r"no probe picture was made in time|a probe picture failed: .* is not healthy"
    assert any(re.match(f"({causes}).*; restarting the server", line) for line in told)


def test_the_probe_command_tells_whether_a_server_makes_pictures(
    repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Server(repository, free_ports()) as server:
        assert main(["probe", "--url", server.grpc_url]) == 0
        out = capsys.readouterr().out
        size = json.loads((repository / "manifest.json").read_text())["limits"]["min_size"]
        assert out.startswith(f"{server.grpc_url} is alive: it made a picture of {size}x{size} in ")
        assert main(["probe", "--url", server.http_url]) == 0
        capsys.readouterr()

        os.kill(server_processes(server.ports)["stable_diffusion"], signal.SIGKILL)
        assert main(["probe", "--url", server.grpc_url]) == 1
        assert "'stable_diffusion_0_0' is not healthy" in capsys.readouterr().err

    assert main(["probe", "--url", server.grpc_url]) == 1


def test_the_response_cache_does_not_answer_probes(repository: Path) -> None:
    """It would hide that the engine cannot."""
    with Server(repository, free_ports(), response_cache_bytes=2**20) as server:
        assert server.make_probe_pictures(WAIT_S)
        os.kill(server_processes(server.ports)["stable_diffusion"], signal.SIGKILL)

        with pytest.raises(DarkroomError):
            server.make_probe_pictures(WAIT_S)
