"""`darkroom serve` as a user runs it, and what it runs, seen from outside."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import tritonclient.grpc

from darkroom.server import Ports, free_ports

WAIT_S = 120.0
SHM = Path("/dev/shm")  # noqa: S108  where Triton keeps its shared memory


def serve_command(repository: Path, ports: Ports, *options: str) -> list[str]:
    return [
        *(sys.executable, "-m", "darkroom.cli", "serve", str(repository), *options),
        *("--http-port", str(ports.http), "--grpc-port", str(ports.grpc)),
        *("--metrics-port", str(ports.metrics)),
    ]


@dataclass
class Serving:
    """A `darkroom serve` that has said that it is ready, and what it tells."""

    process: subprocess.Popen[str]
    ports: Ports
    told: list[str] = field(default_factory=list)
    """Lines on stderr, so far."""
    _changed: threading.Condition = field(default_factory=threading.Condition)

    @property
    def grpc_url(self) -> str:
        return f"127.0.0.1:{self.ports.grpc}"

    @property
    def http_url(self) -> str:
        return f"http://127.0.0.1:{self.ports.http}"

    def listen(self) -> None:
        for line in self.process.stderr:
            with self._changed:
                self.told.append(line.strip())
                self._changed.notify_all()

    def wait_until_told(self, pattern: str, times: int = 1) -> None:
        def count() -> int:
            return sum(re.search(pattern, line) is not None for line in self.told)

        with self._changed:
            assert self._changed.wait_for(lambda: count() >= times, WAIT_S), self.told

    def processes(self) -> dict[str, int]:
        """The tritonserver, as "tritonserver", and the stubs by their model."""
        return server_processes(self.ports)

    def kill(self, name: str) -> None:
        os.kill(self.processes()[name], signal.SIGKILL)

    def wait_until_stepping(self) -> None:
        wait_until_stepping(self.grpc_url)


@contextlib.contextmanager
def serving(repository: Path, *options: str) -> Iterator[Serving]:
    """Runs `darkroom serve`; one that is not stopped meanwhile is killed."""
    ports = free_ports()
    process = subprocess.Popen(
        serve_command(repository, ports, *options),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    serving = Serving(process, ports)
    listener = threading.Thread(target=serving.listen)
    listener.start()
    try:
        assert process.stdout.readline().startswith("ready: "), serving.told
        yield serving
    finally:
        process.kill()
        process.wait()
        listener.join()
        process.stdout.close()
        process.stderr.close()


def server_processes(ports: Ports) -> dict[str, int]:
    """The tritonserver on these ports, as "tritonserver", and its living stubs by their model."""
    lines = {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            words = (entry / "cmdline").read_bytes().decode().split("\0")
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            lines[int(entry.name)] = (parent, words)
    server = next(
        (
            process
            for process, (_, words) in lines.items()
            if f"--grpc-port={ports.grpc}" in words and Path(words[0]).name == "tritonserver"
        ),
        None,
    )
    if server is None:
        return {}
    stubs = {
        Path(words[1]).parts[-3]: process
        for process, (parent, words) in lines.items()
        if parent == server and Path(words[0]).name == "triton_python_backend_stub"
    }
    return {"tritonserver": server, **stubs}


def wait_until_stepping(grpc_url: str) -> None:
    """Returns when requests that were just made are being worked on."""
    with tritonclient.grpc.InferenceServerClient(grpc_url) as triton:

        def num_steps() -> int:
            return triton.get_inference_statistics("unet").model_stats[0].execution_count

        first = num_steps()
        # More than a probe picture makes.
        wait_until(lambda: num_steps() >= first + 3)


def wait_until(is_so: Callable[[], bool]) -> None:
    give_up_at = time.monotonic() + WAIT_S
    while not is_so():
        assert time.monotonic() < give_up_at, "it never came to be so"
        time.sleep(0.02)


def are_gone(processes: dict[str, int]) -> bool:
    """Whether they have ended; one that nobody has buried yet does not count."""
    for process in processes.values():
        with contextlib.suppress(OSError):
            stat = Path(f"/proc/{process}/stat").read_text()
            if stat.rpartition(")")[2].split()[0] not in "ZX":
                return False
    return True


def shm_regions(owner: int) -> list[str]:
    """The shared memory of the servers that the process `owner` has started."""
    return [entry.name for entry in SHM.glob(f"darkroom-{owner}-*")]
