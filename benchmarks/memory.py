"""Measure what each memory profile saves, and what it costs in time.

python benchmarks/memory.py [REPOSITORY]
"""
# ruff: noqa: T201  a command prints

import argparse
import contextlib
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import processes
from command import command_parser, positive
from environment import RESULTS, describe, write_result
from measurements import table

from darkroom import Client, DarkroomError, Picture
from darkroom.progress import terminal_progress
from darkroom.server import Server, free_ports

PROFILES = ("full", "balanced", "low")
SAMPLE_S = 0.1
REQUEST_TIMEOUT_S = 3600.0
IDLE_S = 12.0
"""More than it takes until networks that are not in use have left."""
NOT_MEASURED = "host memory of a server on CPUs: what a GPU's memory would save was not measured"


def main() -> int:
    """Run the command; returns the exit status: 1 also if pictures differ between profiles."""
    options = _parse()
    try:
        trials = {profile: _trial(profile, options) for profile in options.profile or PROFILES}
    except (DarkroomError, OSError) as error:
        print(f"memory: {error}", file=sys.stderr)
        return 1
    are_equal = len({tuple(trial.pictures) for trial in trials.values()}) == 1
    print(f"\n{_report(trials, options)}\n\npictures are {'' if are_equal else 'NOT '}the same")
    first = next(iter(trials.values()))
    output = options.output or RESULTS / f"memory-{first.environment['model']['name']}.json"
    write_result(
        output,
        {
            "benchmark": "memory",
            "environment": first.environment,
            "remark": NOT_MEASURED,
            "seed": options.seed,
            "pictures": options.pictures,
            "steps": options.steps,
            "size": options.size,
            "are_equal": are_equal,
            "profiles": {profile: trial.result() for profile, trial in trials.items()},
        },
    )
    print(f"\nwritten: {output}")
    return 0 if are_equal else 1


def _parse() -> argparse.Namespace:
    parser = command_parser(__doc__)
    parser.add_argument(
        "--pictures", type=positive, default=4, metavar="N", help="default: %(default)s"
    )
    parser.add_argument(
        "--steps", type=positive, default=20, metavar="N", help="of each; default: %(default)s"
    )
    parser.add_argument("--size", type=positive, metavar="N", help="default: the checkpoint's")
    parser.add_argument("--profile", action="append", choices=PROFILES, help="only these")
    return parser.parse_args()


@dataclass(frozen=True)
class Phase:
    """What was done, how long it took, and the memory that the server held meanwhile."""

    seconds: float
    pss_kb: list[int]
    """Of all its processes together, every tenth of a second or so."""

    @property
    def peak_mb(self) -> float:
        return max(self.pss_kb) / 1024

    @property
    def end_mb(self) -> float:
        return self.pss_kb[-1] / 1024

    def result(self) -> dict[str, Any]:
        return {
            "seconds": round(self.seconds, 3),
            "peak_mb": round(self.peak_mb, 1),
            "end_mb": round(self.end_mb, 1),
            "pss_kb": self.pss_kb,
        }


@dataclass(frozen=True)
class Trial:
    """One profile."""

    environment: dict[str, Any]
    phases: dict[str, Phase]
    pictures: list[bytes]

    def result(self) -> dict[str, Any]:
        return {name: phase.result() for name, phase in self.phases.items()}


def _trial(profile: str, options: argparse.Namespace) -> Trial:
    parameters = {"memory_profile": profile}
    server = Server(options.repository, free_ports(), engine_parameters=parameters)
    phases: dict[str, Phase] = {}
    try:
        with terminal_progress(f"{profile}: starting"), Meter(server) as meter:
            server.start()
        phases["start"] = meter.phase()
        with Client(server.grpc_url, timeout=REQUEST_TIMEOUT_S) as client:
            with terminal_progress(f"{profile}: a picture after a pause"), Meter(server) as meter:
                time.sleep(IDLE_S)
                start = time.monotonic()
                pictures = [_ask(client, options, 0)]
                lone_s = time.monotonic() - start
            phases["lone"] = Phase(lone_s, meter.pss_kb)
            with (
                terminal_progress(f"{profile}: {options.pictures} in a row"),
                Meter(server) as meter,
            ):
                pictures += [_ask(client, options, n) for n in range(1, options.pictures + 1)]
            phases["in a row"] = meter.phase()
            with (
                terminal_progress(f"{profile}: {options.pictures} at once"),
                Meter(server) as meter,
                ThreadPoolExecutor(options.pictures) as pool,
            ):
                numbers = range(1, options.pictures + 1)
                pictures += pool.map(lambda n: _ask(client, options, n), numbers)
            phases["at once"] = meter.phase()
            with terminal_progress(f"{profile}: idle"), Meter(server) as meter:
                time.sleep(IDLE_S)
            phases["idle"] = meter.phase()
        return Trial(describe(server), phases, [picture.tobytes() for picture in pictures])
    finally:
        server.stop()


def _ask(client: Client, options: argparse.Namespace, number: int) -> Picture:
    # A prompt of its own each, so that the text encoder has to be there.
    return client.generate(
        f"a large red circle on a blue background, number {number}",
        seed=options.seed + number,
        num_inference_steps=options.steps,
        width=options.size,
        height=options.size,
    )


class Meter:
    """Measures the memory of a server's processes, together, while its block runs."""

    def __init__(self, server: Server) -> None:
        self._port = server.ports.grpc
        self.pss_kb: list[int] = []
        self._start = self._end = 0.0
        self._is_done = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._start = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end = time.monotonic()
        self._is_done.set()
        self._thread.join()

    def phase(self) -> Phase:
        return Phase(self._end - self._start, self.pss_kb)

    def _run(self) -> None:
        while True:
            is_last = self._is_done.is_set()
            self.pss_kb.append(_pss_kb(self._port))
            if is_last:
                return
            self._is_done.wait(SAMPLE_S)


def _pss_kb(grpc_port: int) -> int:
    """Of the server and all its children; two of one network may live for a moment."""
    server = processes.server_processes(grpc_port).get(processes.SERVER)
    if server is None:
        return 0
    total = 0
    for process in [server, *_children(server)]:
        # One that ends meanwhile holds nothing any more.
        with contextlib.suppress(OSError, KeyError):
            total += processes.memory(process).pss
    return total


def _children(parent: int) -> list[int]:
    children: list[int] = []
    for thread in Path(f"/proc/{parent}/task").glob("*"):
        with contextlib.suppress(OSError):
            children += map(int, (thread / "children").read_text().split())
    return children


def _report(trials: dict[str, Trial], options: argparse.Namespace) -> str:
    rows: list[Sequence[str]] = []
    for profile, trial in trials.items():
        phases = trial.phases
        work = [phases[name] for name in ("lone", "in a row", "at once")]
        rows.append(
            [
                profile,
                f"{phases['start'].peak_mb:.0f}",
                f"{max(phase.peak_mb for phase in work):.0f}",
                f"{phases['idle'].end_mb:.0f}",
                *(f"{phase.seconds:.1f}" for phase in (phases["start"], *work)),
            ]
        )
    header = ["profile", "MB at start, peak", "at work, peak", "idle"]
    header += ["start s", "a lone picture s", "in a row s", "at once s"]
    return (
        f"{options.pictures} pictures of {options.steps} steps, in a row and at once\n"
        f"MB: PSS of all processes of the server; {NOT_MEASURED}\n\n{table(header, rows)}"
    )


if __name__ == "__main__":
    sys.exit(main())
