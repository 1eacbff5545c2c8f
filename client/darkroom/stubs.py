"""The processes of a tritonserver, as /proc shows them: one stub for each Python model."""

import contextlib
import os
import signal
import time
from pathlib import Path

_PROC = Path("/proc")
_BURIAL_S = 0.1
_KILL_TIMEOUT_S = 10.0


class Stubs:
    """Which model each stub of one tritonserver serves, and which of them have died.

    Triton neither notices a stub's death nor buries it: it stays a zombie for as long as the server
    lives. A stub that Triton itself ends, to unload a model, is a zombie for a moment at most.
    """

    def __init__(self, server: int) -> None:
        self._server = server
        self._models: dict[int, str] = {}
        self._zombie_since: dict[int, float] = {}

    def dead(self) -> dict[int, str]:
        """The models of the stubs that have died, by process id, at the second look at them."""
        now = time.monotonic()
        zombies, _ = self._look()
        return {
            stub: model
            for stub, model in zombies.items()
            if now - self._zombie_since[stub] >= _BURIAL_S
        }

    def lost_models(self) -> set[str]:
        """The models that had a stub which died, and have none that lives."""
        zombies, living = self._look()
        return {*zombies.values()} - {*living.values()}

    def _look(self) -> tuple[dict[int, str], dict[int, str]]:
        """The models of the zombies and of the living stubs, by process id.

        It also remembers which model each serves: a zombie does not tell.
        """
        zombies, living = {}, {}
        for child in self._children():
            with contextlib.suppress(OSError):
                if _state(child) == "Z":
                    zombies[child] = self._models.get(child, "a model's process")
                    self._zombie_since.setdefault(child, time.monotonic())
                elif model := _model(child):
                    living[child] = self._models[child] = model
        return zombies, living

    def _children(self) -> list[int]:
        children: list[int] = []
        # Each belongs to the thread that started it, and threads come and go.
        for thread in (_PROC / str(self._server) / "task").glob("*"):
            with contextlib.suppress(OSError):
                children += map(int, (thread / "children").read_text().split())
        return children


def kill_group(group: int) -> None:
    """Kill all processes of a group; returns when they hold neither memory nor ports any more."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
    give_up_at = time.monotonic() + _KILL_TIMEOUT_S
    while _lives(group) and time.monotonic() < give_up_at:
        time.sleep(0.01)


def bury_group(group: int) -> None:
    """Reap a killed group's orphans, which fall to this process if it is a container's first."""
    give_up_at = time.monotonic() + _KILL_TIMEOUT_S
    with contextlib.suppress(ChildProcessError):
        while time.monotonic() < give_up_at:
            if not os.waitpid(-group, os.WNOHANG)[0]:
                time.sleep(0.01)


def _lives(group: int) -> bool:
    for entry in _PROC.iterdir():
        if not entry.name.isdecimal():
            continue
        with contextlib.suppress(OSError):
            stat = _stat(int(entry.name))
            # The memory of a zombie is its own for as long as it has a thread that is not one.
            if int(stat[2]) == group and (stat[0] not in "ZX" or int(stat[17]) > 1):
                return True
    return False


def _state(process: int) -> str:
    """One letter: Z is a zombie."""
    return _stat(process)[0]


def _stat(process: int) -> list[str]:
    """The fields that proc(5) numbers from 3: state, parent, process group and more."""
    # The name before these, in parentheses, may contain anything.
    return (_PROC / str(process) / "stat").read_text().rpartition(")")[2].split()


def _model(process: int) -> str | None:
    """The model that a stub serves; None is no stub, or not one yet."""
    words = (_PROC / str(process) / "cmdline").read_bytes().split(b"\0")
    if Path(os.fsdecode(words[0])).name != "triton_python_backend_stub":
        return None
    # Its first argument is REPOSITORY/MODEL/VERSION/model.py.
    return Path(os.fsdecode(words[1])).parts[-3]
