"""Starting, stopping and failing to start, each with a server of its own."""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from serving import (
    WAIT_S,
    are_gone,
    serve_command,
    server_processes,
    serving,
    shm_regions,
    wait_until,
    wait_until_stepping,
)

from darkroom import Client, DarkroomError, RequestTimeout
from darkroom.server import Ports, ServeError, Server, free_ports


def models(repository: Path) -> set[str]:
    return {config.parent.name for config in repository.glob("*/config.pbtxt")}


@pytest.mark.parametrize("stop_signal", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_everything_cleanly(repository: Path, stop_signal: signal.Signals) -> None:
    with serving(repository) as served:
        processes = served.processes()
        assert processes.keys() == {"tritonserver", *models(repository)}
        assert shm_regions(served.process.pid)

        served.process.send_signal(stop_signal)

        assert served.process.wait(WAIT_S) == 0
        assert are_gone(processes)
    assert served.told[-1] == "stopping"
    assert shm_regions(served.process.pid) == []


@pytest.mark.parametrize("stop_signal", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_interrupts_a_start(repository: Path, stop_signal: signal.Signals) -> None:
    ports = free_ports()
    process = subprocess.Popen(
        serve_command(repository, ports), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_until(lambda: "tritonserver" in server_processes(ports))
    processes = server_processes(ports)
    process.send_signal(stop_signal)
    out, err = process.communicate(timeout=WAIT_S)

    assert process.returncode == 130
    assert out == ""
    assert "Traceback" not in err
    assert are_gone(processes)
    assert shm_regions(process.pid) == []


def test_a_stop_answers_requests_that_are_running(repository: Path) -> None:
    """Nothing hangs: a request ends in a picture or in an error, never in silence."""
    with (
        serving(repository) as served,
        Client(served.grpc_url) as client,
        ThreadPoolExecutor() as pool,
    ):
        request = pool.submit(client.generate, "a red circle", num_inference_steps=150)
        served.process.send_signal(signal.SIGTERM)

        assert isinstance(request.exception(WAIT_S), DarkroomError) or request.result().size
        assert served.process.wait(WAIT_S) == 0


def test_a_killed_serve_leaves_no_server_behind(repository: Path) -> None:
    """Even with requests on their way, which are answered with an error."""
    with (
        serving(repository) as served,
        Client(served.grpc_url) as client,
        ThreadPoolExecutor() as pool,
    ):
        processes = served.processes()
        requests = [
            pool.submit(client.generate, "a red circle", num_inference_steps=150, seed=seed)
            for seed in range(4)
        ]
        served.process.kill()
        served.process.wait(WAIT_S)

        wait_until(lambda: are_gone(processes))
        for request in requests:
            assert isinstance(request.exception(WAIT_S), DarkroomError) or request.result().size

    wait_until(lambda: shm_regions(served.process.pid) == [])
    # The files that a killed program could not remove itself, the next one does.
    files = list(Path(tempfile.gettempdir()).glob(f"darkroom-{served.process.pid}-*"))
    assert files
    Server(repository).stop()
    assert not any(file.exists() for file in files)


def test_a_server_that_hangs_does_not_outlive_a_killed_serve(repository: Path) -> None:
    with serving(repository) as served:
        processes = served.processes()
        # It cannot even notice that it is asked to stop.
        os.kill(processes["tritonserver"], signal.SIGSTOP)
        served.process.kill()

        wait_until(lambda: are_gone(processes))
        wait_until(lambda: shm_regions(served.process.pid) == [])


def test_a_stop_does_not_wait_for_answers_that_cannot_come(repository: Path) -> None:
    """Nor do the clients: an engine whose process has died has taken its answers with it."""
    with (
        Server(repository, free_ports()) as server,
        Client(server.grpc_url) as client,
        ThreadPoolExecutor() as pool,
    ):
        processes = server_processes(server.ports)
        request = pool.submit(client.generate, "a red circle", num_inference_steps=150, width=256)
        wait_until_stepping(server.grpc_url)
        os.kill(processes["stable_diffusion"], signal.SIGKILL)
        server.stop()

        assert isinstance(request.exception(WAIT_S), DarkroomError)
        assert are_gone(processes)


def test_an_engine_that_dies_while_it_starts_is_an_error_not_a_hang(
    repository: Path, tmp_path: Path
) -> None:
    copy = copied(repository, tmp_path)
    model = copy / "stable_diffusion" / "1" / "model.py"
    dying = "def execute(self, _):\n        __import__('os')._exit(1)\n\n    def former("
    model.write_text(model.read_text().replace("def execute(", dying))

    with pytest.raises(ServeError, match=r"^stable_diffusion died"):
        Server(copy, free_ports()).start()


def test_the_models_get_a_folder_of_their_own_for_sockets(server: Server) -> None:
    process = server_processes(server.ports)["stable_diffusion"]
    environment = Path(f"/proc/{process}/environ").read_bytes().decode().split("\0")
    named = dict(line.split("=", 1) for line in environment if line)["DARKROOM_RUNTIME_DIR"]

    assert Path(named).stat().st_mode & 0o777 == 0o700


def test_the_log_is_appended_to_a_file_that_stays(repository: Path, tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    log.write_text("E1124 from an earlier run\n")
    with Server(repository, free_ports(), log_file=log):
        pass

    assert log.read_text().startswith("E1124 from an earlier run\n")
    assert "successfully loaded 'stable_diffusion'" in log.read_text()


def test_a_failure_tells_the_errors_of_its_own_run_only(repository: Path, tmp_path: Path) -> None:
    copy = copied(repository, tmp_path)
    (copy / "unet" / "1" / "model.onnx").unlink()
    log = tmp_path / "server.log"
    log.write_text("E1124 from an earlier run\n")

    with pytest.raises(ServeError, match="unet") as failure:
        Server(copy, free_ports(), log_file=log).start()
    assert "earlier run" not in str(failure.value)


def test_a_log_file_that_cannot_be_written_is_named(repository: Path, tmp_path: Path) -> None:
    with pytest.raises(ServeError, match=r"log file .*/nowhere/server.log: No such file"):
        Server(repository, free_ports(), log_file=tmp_path / "nowhere" / "server.log").start()


def test_the_serving_processes_hold_no_pytorch(server: Server, client: Client) -> None:
    client.generate("a red circle", num_inference_steps=1)
    processes = server_processes(server.ports)

    assert processes.keys() == {"tritonserver", *models(server.repository)}
    for process in processes.values():
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


def test_a_request_past_its_deadline_is_answered(client: Client) -> None:
    with pytest.raises(RequestTimeout, match="timeout_ms: 30 ran out"):
        client.generate(
            "a red circle", num_inference_steps=150, width=256, height=256, timeout_ms=30
        )


def test_a_client_timeout_is_an_error_and_the_next_request_is_served(client: Client) -> None:
    with pytest.raises(RequestTimeout):
        client.generate("a red circle", num_inference_steps=150, width=256, height=256, timeout=0.2)

    assert client.generate("a red circle", num_inference_steps=2).size
