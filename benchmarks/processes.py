"""The processes of a server, as /proc shows them: who they are, what memory and time they take."""

import contextlib
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
SHM = Path("/dev/shm")  # noqa: S108  where Triton's Python backend keeps its shared memory
SERVER = "tritonserver"
_STUB = "triton_python_backend_stub"
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Memory:
    """What one process holds, in kB."""

    pss: int
    """Resident memory, with its share of what it has in common with others."""
    private: int
    """Anonymous memory: the heap and the like, which is what leaks."""


def server_processes(grpc_port: int) -> dict[str, int]:
    """Process ids: of the server that listens on this port, and of its stubs by their model."""
    commands = {}
    for entry in PROC.iterdir():
        with contextlib.suppress(OSError, ValueError):
            words = (entry / "cmdline").read_bytes().decode().split("\0")
            commands[int(entry.name)] = (Path(words[0]).name, words)
    servers = [
        process
        for process, (name, words) in commands.items()
        if name == SERVER and f"--grpc-port={grpc_port}" in words
    ]
    if not servers:
        return {}
    found = {SERVER: servers[0]}
    for process, (name, words) in commands.items():
        with contextlib.suppress(OSError):
            if name == _STUB and _stat(process)[1] == str(servers[0]):
                # Its first argument is REPOSITORY/MODEL/VERSION/model.py.
                found[Path(words[1]).parts[-3]] = process
    return found


def memory(process: int) -> Memory:
    """The memory of a process.

    Raises:
        OSError: there is no such process.
    """
    return parse_smaps_rollup((PROC / str(process) / "smaps_rollup").read_text())


def parse_smaps_rollup(text: str) -> Memory:
    sizes = {name: int(kilobytes) for name, kilobytes in re.findall(r"(\w+): +(\d+) kB", text)}
    return Memory(pss=sizes["Pss"], private=sizes["Anonymous"])


def shared_memory_kb(prefix: str) -> int:
    """What the files in /dev/shm take whose names begin so."""
    total = 0
    for region in SHM.glob(f"{prefix}*"):
        with contextlib.suppress(OSError):
            total += region.stat().st_blocks * 512
    return total // 1024


def renice(process: int, nice: int) -> None:
    """Lower the priority of a process, that is, on Linux, of each of its threads."""
    for task in (PROC / str(process) / "task").iterdir():
        os.setpriority(os.PRIO_PROCESS, int(task.name), nice)


def cpu_s(process: int) -> float:
    """CPU time that a process has taken so far; 0 if it is gone."""
    with contextlib.suppress(OSError):
        user, system = _stat(process)[11:13]
        return (int(user) + int(system)) / _TICKS_PER_S
    return 0.0


def machine_cpu_s() -> float:
    """CPU time that all processes of the machine have taken so far."""
    words = (PROC / "stat").read_text().split("\n", 1)[0].split()
    user, nice, system, _, _, irq, softirq = (int(word) for word in words[1:8])
    return (user + nice + system + irq + softirq) / _TICKS_PER_S


class CoresUsed:
    """How many cores each process keeps busy at a mean, from the making of this object on."""

    CLIENT = "client"
    OTHERS = "others"

    def __init__(self, server: Mapping[str, int]) -> None:
        """Count for the processes of a server, by name, for this one, and for all others."""
        self._processes = {**server, self.CLIENT: os.getpid()}
        self._start_s = time.monotonic()
        self._start = self._cpu_s()

    def result(self) -> dict[str, float]:
        """Cores by name of process, since then; of other programs under `OTHERS`."""
        wall_s = time.monotonic() - self._start_s
        now = self._cpu_s()
        # The kernel counts in ticks, so that what is left for others may be less than nothing.
        return {name: max(0.0, round((now[name] - self._start[name]) / wall_s, 3)) for name in now}

    def _cpu_s(self) -> dict[str, float]:
        taken = {name: cpu_s(process) for name, process in self._processes.items()}
        return {**taken, self.OTHERS: machine_cpu_s() - sum(taken.values())}


def _stat(process: int) -> list[str]:
    """State, parent, process group, and more, as proc_pid_stat(5) has them from its third on."""
    # The name before these, in parentheses, may contain anything.
    return (PROC / str(process) / "stat").read_text().rpartition(")")[2].split()
