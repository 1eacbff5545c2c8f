"""Starting, stopping and failing to start, each with a server of its own."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from darkroom import Client, DarkroomError, RequestTimeout
from darkroom.server import Ports, ServeError, Server, free_ports

WAIT_S = 60.0
SHM = Path("/dev/shm")  # noqa: S108  where Triton keeps its shared memory


def serve_command(repository: Path, ports: Ports) -> list[str]:
    return [
        *(sys.executable, "-m", "darkroom.cli", "serve", str(repository)),
        *("--http-port", str(ports.http), "--grpc-port", str(ports.grpc)),
        *("--metrics-port", str(ports.metrics)),
    ]


@contextlib.contextmanager
def serving(repository: Path) -> Iterator[tuple[subprocess.Popen[str], Ports]]:
    """`darkroom serve` as a user runs it, once it has said that it is ready."""
    ports = free_ports()
    process = subprocess.Popen(
        serve_command(repository, ports), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("ready: ")
        yield process, ports
    finally:
        process.kill()
        process.communicate()


def server_processes(ports: Ports) -> list[int]:
    """The tritonserver on these ports and its stubs."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            words = (entry / "cmdline").read_bytes()
            if f"--grpc-port={ports.grpc}".encode() in words:
                found.append(int(entry.name))
                children = (entry / "task" / entry.name / "children").read_text().split()
                found += [int(child) for child in children]
    return found


def are_gone(processes: list[int]) -> bool:
    return not any(Path(f"/proc/{process}").exists() for process in processes)


def wait_until_gone(processes: list[int]) -> None:
    give_up_at = time.monotonic() + WAIT_S
    while not are_gone(processes):
        assert time.monotonic() < give_up_at, "processes are left"
        time.sleep(0.05)


def shm_regions() -> set[str]:
    return {entry.name for entry in SHM.iterdir() if entry.name.startswith("darkroom-")}


@pytest.mark.parametrize("stop_signal", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_everything_cleanly(repository: Path, stop_signal: signal.Signals) -> None:
    before = shm_regions()
    with serving(repository) as (process, ports):
        processes = server_processes(ports)
        assert len(processes) == 5  # the server, three networks and the engine
        assert shm_regions() > before

        process.send_signal(stop_signal)

        assert process.wait(WAIT_S) == 0
        assert are_gone(processes)
    assert shm_regions() == before


def test_a_stop_answers_requests_that_are_running(repository: Path) -> None:
    """Nothing hangs: a request ends in a picture or in an error, never in silence."""
    with (
        serving(repository) as (process, ports),
        Client(f"127.0.0.1:{ports.grpc}") as client,
        ThreadPoolExecutor() as pool,
    ):
        request = pool.submit(client.generate, "a red circle", num_inference_steps=150)
        process.send_signal(signal.SIGTERM)

        assert isinstance(request.exception(WAIT_S), DarkroomError) or request.result().size
        assert process.wait(WAIT_S) == 0


def test_a_killed_serve_leaves_no_server_behind(repository: Path) -> None:
    """Even with requests on their way, which are answered with an error."""
    with (
        serving(repository) as (process, ports),
        Client(f"127.0.0.1:{ports.grpc}") as client,
        ThreadPoolExecutor() as pool,
    ):
        processes = server_processes(ports)
        requests = [
            pool.submit(client.generate, "a red circle", num_inference_steps=150, seed=seed)
            for seed in range(4)
        ]
        process.kill()
        process.wait(WAIT_S)

        wait_until_gone(processes)
        for request in requests:
            assert isinstance(request.exception(WAIT_S), DarkroomError) or request.result().size

    # What a killed program could not remove itself, the next one does.
    leftovers = shm_regions()
    Server(repository).stop()
    assert not {name for name in leftovers if name.startswith(f"darkroom-{process.pid}-")} & (
        shm_regions()
    )


def test_the_serving_processes_hold_no_pytorch(server: Server, client: Client) -> None:
    client.generate("a red circle", num_inference_steps=1)
    processes = server_processes(server.ports)

    assert len(processes) == 5
    for process in processes:
        assert "torch" not in Path(f"/proc/{process}/maps").read_text()


def test_serve_says_what_it_cannot_do_in_one_line(repository: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ServeError, match=f"port {port} of 127.0.0.1 cannot be used: .* --grpc"):
            Server(repository, Ports(grpc=port)).start()
    with pytest.raises(
        ServeError, match=r"manifest.json is missing: .* darkroom export CHECKPOINT"
    ):
        Server(tmp_path)


def copied(repository: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "copy"
    shutil.copytree(repository, copy)
    return copy


def test_a_changed_network_is_refused_by_name(repository: Path, tmp_path: Path) -> None:
    copy = copied(repository, tmp_path)
    with (copy / "unet" / "1" / "model.onnx").open("r+b") as stream:
        # Inside the weights, where ONNX Runtime would not notice.
        stream.seek(-1000, os.SEEK_END)
        stream.write(b"\0" * 4)

    with pytest.raises(ServeError, match=r"unet: .*model.onnx is not the file that was verified"):
        Server(copy, free_ports()).start()


def test_a_missing_network_file_is_an_error_not_a_hang(repository: Path, tmp_path: Path) -> None:
    copy = copied(repository, tmp_path)
    (copy / "vae_decoder" / "1" / "model.onnx").unlink()

    with pytest.raises(ServeError, match=r"vae_decoder.*model.onnx"):
        Server(copy, free_ports()).start()


def test_a_bad_engine_setting_is_refused_by_name(repository: Path, tmp_path: Path) -> None:
    copy = copied(repository, tmp_path)
    config = copy / "stable_diffusion" / "config.pbtxt"
    config.write_text(config.read_text().replace('string_value: "16"', 'string_value: "1"'))

    with pytest.raises(ServeError, match="max_rows: 1 is outside 2 to 1024"):
        Server(copy, free_ports()).start()


def test_a_client_timeout_is_an_error_and_the_next_request_is_served(client: Client) -> None:
    with pytest.raises(RequestTimeout):
        client.generate("a red circle", num_inference_steps=150, width=256, height=256, timeout=0.2)

    assert client.generate("a red circle", num_inference_steps=2).size


def test_a_request_past_its_deadline_is_answered(client: Client) -> None:
    with pytest.raises(RequestTimeout, match="timeout_ms: 30 ran out"):
        client.generate(
            "a red circle", num_inference_steps=150, width=256, height=256, timeout_ms=30
        )
