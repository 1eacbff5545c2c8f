"""Measure what decoding pictures costs the steps of those that are still running.

python benchmarks/decode.py [REPOSITORY]
"""
# ruff: noqa: T201  a command prints

import argparse
import contextlib
import os
import statistics
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from command import command_parser, positive
from environment import RESULTS, describe, write_result
from measurements import Answer, percentiles, table
from processes import CoresUsed, renice, server_processes
from serving import REQUEST_TIMEOUT_S, serving
from steps import Phase, same_rows_ms, split
from variant import repository_with

from darkroom import Client, DarkroomError, EventStream, Step
from darkroom.progress import terminal_progress
from darkroom.server import Server

PROMPT = "a large red circle on a blue background"
GUIDANCE_SCALE = 1.0
NUM_SHORTS = 2
PHASES = ("alone", "more rows", "decoding", "alone again")
STREAM_TIMEOUT_S = 600.0
NUM_LONE = 5
"""Short requests that have the server for themselves."""
QUIET_CORES = 0.1
"""A round is made again if other programs kept more cores busy than that."""
MAX_ATTEMPTS = 4


@dataclass(frozen=True)
class Variant:
    """A way to decode."""

    name: str
    overlap_decode: int = 1
    threads: int = 0
    """Of the VAE decoder; 0 is one for each core."""
    nice: int = 0
    """Of the VAE decoder's process."""


VARIANTS = (
    Variant("between the steps", overlap_decode=0),
    Variant("beside them"),
    Variant("beside them, one thread", threads=1),
    Variant("beside them, nice 5", nice=5),
    Variant("beside them, nice 10", nice=10),
)


def main() -> int:
    """Run the command; returns the exit status."""
    options = _parse()
    try:
        with contextlib.ExitStack() as stack:
            # All at once: what is idle takes no time, and the rounds of all can be side by side.
            servers = {
                variant: stack.enter_context(_serving(variant, options)) for variant in VARIANTS
            }
            environment = describe(servers[VARIANTS[1]])
            rounds = _measure(servers, options)
    except (DarkroomError, ValueError, OSError) as error:
        print(f"decode: {error}", file=sys.stderr)
        return 1
    print(f"\n{_report(rounds, options)}")
    output = options.output or RESULTS / f"decode-{environment['model']['name']}.json"
    write_result(output, _result(rounds, environment, options))
    print(f"\nwritten: {output}")
    return 0


@dataclass(frozen=True)
class Round:
    """The phases of one long request."""

    phases: dict[str, Phase]
    shorts: list[Answer]
    """What was decoded meanwhile: those that were answered in the phase of decoding."""
    lone: list[Answer]
    """The same while nothing else went on."""
    cores: dict[str, float]
    """Kept busy by each process at a mean, and by other programs."""

    @cached_property
    def alone_ms(self) -> float:
        return statistics.median(self.phases["alone"].step_ms + self.phases["alone again"].step_ms)

    @cached_property
    def rows_per_step(self) -> float:
        """Rows that each step had more because of the short requests, which take one step each."""
        return min(NUM_SHORTS, len(self.shorts) / self.phases["decoding"].num_steps)

    @cached_property
    def baseline_ms(self) -> float:
        """A step of the same rows without any decoding."""
        full = statistics.median(self.phases["more rows"].step_ms)
        return same_rows_ms(self.alone_ms, full, NUM_SHORTS, self.rows_per_step)

    @property
    def others_cores(self) -> float:
        return self.cores[CoresUsed.OTHERS]

    @property
    def mean_ratio(self) -> float:
        return self.phases["decoding"].mean_ms / self.baseline_ms

    @property
    def pictures_per_s(self) -> float:
        return len(self.shorts) / self.phases["decoding"].wall_s

    def result(self) -> dict[str, Any]:
        start = self.phases["alone"].arrived_s[0]
        return {
            "baseline_ms": round(self.baseline_ms, 2),
            "mean_ratio": round(self.mean_ratio, 3),
            "rows_per_step": round(self.rows_per_step, 3),
            "pictures_per_s": round(self.pictures_per_s, 3),
            "cores": self.cores,
            "step_arrived_s": {
                name: [round(stamp - start, 4) for stamp in phase.arrived_s]
                for name, phase in self.phases.items()
            },
            "shorts": [answer.since(start) for answer in self.shorts],
            "lone": [answer.since(start) for answer in self.lone],
        }


def _parse() -> argparse.Namespace:
    parser = command_parser(__doc__)
    parser.add_argument(
        "--repeats", type=positive, default=4, metavar="N", help="default: %(default)s"
    )
    parser.add_argument(
        "--rows", type=positive, default=4, metavar="N", help="long requests; default: %(default)s"
    )
    parser.add_argument(
        "--steps", type=positive, default=100, metavar="N", help="of each; default: %(default)s"
    )
    parser.add_argument(
        "--size", type=positive, default=256, metavar="N", help="in pixels; default: %(default)s"
    )
    return parser.parse_args()


@contextlib.contextmanager
def _serving(variant: Variant, options: argparse.Namespace) -> Iterator[Server]:
    parameters = {
        "stable_diffusion": {
            "overlap_decode": variant.overlap_decode,
            # Larger pictures have fewer rows: enough for all at the size that is asked for.
            "max_rows": 63,
        },
        "vae_decoder": {"intra_op_thread_count": variant.threads},
    }
    with repository_with(options.repository, parameters) as repository, serving(repository) as it:
        renice(server_processes(it.ports.grpc)["vae_decoder"], variant.nice)
        yield it


def _measure(
    servers: dict[Variant, Server], options: argparse.Namespace
) -> dict[Variant, list[Round]]:
    rounds: dict[Variant, list[Round]] = {variant: [] for variant in servers}
    for repeat in range(1, options.repeats + 1):
        for variant, server in servers.items():
            progress = f"{variant.name}: round {repeat} of {options.repeats}"
            with Client(server.grpc_url, timeout=REQUEST_TIMEOUT_S) as client:
                trial = Trial(client, options)
                if repeat == 1:
                    with terminal_progress(f"{variant.name}: warming up"):
                        trial.warm_up()
                with terminal_progress(progress):
                    rounds[variant].append(_quiet_round(trial, server))
    return rounds


def _quiet_round(trial: "Trial", server: Server) -> Round:
    """The first round that others did not disturb, or of some the least disturbed."""
    made: list[Round] = []
    while not made or (made[-1].others_cores > QUIET_CORES and len(made) < MAX_ATTEMPTS):
        made.append(trial.run(server))
    return min(made, key=lambda it: it.others_cores)


class LongRequest:
    """A streamed request that is read on a thread of its own, and when its steps came."""

    def __init__(self, stream: EventStream, pool: ThreadPoolExecutor) -> None:
        self.arrived_s: list[float] = []
        self._stream = stream
        self._changed = threading.Condition()
        self._is_over = False
        self._is_closed = False
        self._reading = pool.submit(self._read)

    def wait_for_step(self, step: int) -> None:
        """Returns when that many steps have come.

        Raises:
            DarkroomError: the request failed.
        """
        with self._changed:
            self._changed.wait_for(lambda: len(self.arrived_s) >= step or self._is_over)
        if len(self.arrived_s) < step:
            self._reading.result()

    def finish(self) -> None:
        """Wait for the end.

        Raises:
            DarkroomError: the request failed.
        """
        self._reading.result()

    def close(self) -> None:
        self._is_closed = True
        self._stream.close()

    def _read(self) -> None:
        try:
            for event in self._stream:
                if isinstance(event, Step):
                    with self._changed:
                        self.arrived_s.append(time.monotonic())
                        self._changed.notify_all()
        except DarkroomError:
            if not self._is_closed:
                raise
        finally:
            with self._changed:
                self._is_over = True
                self._changed.notify_all()


class Trial:
    """Rounds on one server: long requests, and others beside them by and by."""

    def __init__(self, client: Client, options: argparse.Namespace) -> None:
        self._client = client
        self._options = options
        self._shorts: list[Answer] = []

    def warm_up(self) -> None:
        """The prompt's embedding, and the networks at the sizes of batch that come up."""
        with ThreadPoolExecutor() as pool:
            num_rows = self._options.rows + NUM_SHORTS
            longs = [LongRequest(self._stream(2), pool) for _ in range(num_rows)]
            for long in longs:
                long.finish()

    def run(self, server: Server) -> Round:
        options = self._options
        boundaries = [round(n * options.steps / len(PHASES)) for n in range(len(PHASES) + 1)]
        self._shorts = []
        cores = CoresUsed(server_processes(server.ports.grpc))
        lone = [self._ask() for _ in range(NUM_LONE)]
        with ThreadPoolExecutor(options.rows + NUM_SHORTS) as pool:
            longs = [LongRequest(self._stream(options.steps), pool) for _ in range(options.rows)]
            watched = longs[0]
            watched.wait_for_step(boundaries[1])
            with self._more_rows(pool):
                watched.wait_for_step(boundaries[2])
            with self._ask_beside(pool):
                watched.wait_for_step(boundaries[3])
            for long in longs:
                long.finish()
        phases = dict(zip(PHASES, split(watched.arrived_s, boundaries), strict=True))
        beside = [it for it in self._shorts if phases["decoding"].holds(it.answered_s)]
        if not beside:
            raise ValueError(f"steps: {options.steps} are too few for a picture to be decoded")
        return Round(phases, beside, lone, cores.result())

    @contextlib.contextmanager
    def _more_rows(self, pool: ThreadPoolExecutor) -> Iterator[None]:
        """Rows that go on all the time, and leave without being decoded."""
        rows = [LongRequest(self._stream(self._options.steps), pool) for _ in range(NUM_SHORTS)]
        try:
            yield
        finally:
            for row in rows:
                row.close()
        for row in rows:
            row.finish()

    @contextlib.contextmanager
    def _ask_beside(self, pool: ThreadPoolExecutor) -> Iterator[None]:
        """Requests of one step, as soon as the one before is answered."""
        is_enough = threading.Event()
        loops = [pool.submit(self._ask_again_and_again, is_enough) for _ in range(NUM_SHORTS)]
        try:
            yield
        finally:
            is_enough.set()
        for loop in loops:
            loop.result()

    def _ask_again_and_again(self, is_enough: threading.Event) -> None:
        while not is_enough.is_set():
            self._shorts.append(self._ask())

    def _ask(self) -> Answer:
        size = self._options.size
        sent = time.monotonic()
        picture = self._client.generate(
            PROMPT, num_inference_steps=1, guidance_scale=GUIDANCE_SCALE, width=size, height=size
        )
        return Answer(sent, time.monotonic(), picture.timings, picture.queue_steps)

    def _stream(self, num_steps: int) -> EventStream:
        size = self._options.size
        return self._client.stream(
            PROMPT,
            num_inference_steps=num_steps,
            guidance_scale=GUIDANCE_SCALE,
            width=size,
            height=size,
            timeout=STREAM_TIMEOUT_S,
        )


def _summary(rounds: Sequence[Round]) -> dict[str, Any]:
    """The numbers of a variant; times are of all rounds, ratios are medians over the rounds."""
    step_ms = [gap for measured in rounds for gap in measured.phases["decoding"].step_ms]
    ratios = [
        [gap / measured.baseline_ms for gap in measured.phases["decoding"].step_ms]
        for measured in rounds
    ]
    shorts = [answer for measured in rounds for answer in measured.shorts]
    return {
        "step_ms": {**percentiles(step_ms), "max": round(max(step_ms), 3)},
        "alone_ms": round(statistics.median(measured.alone_ms for measured in rounds), 3),
        "baseline_ms": round(statistics.median(measured.baseline_ms for measured in rounds), 3),
        "ratio": {
            "mean": _median([measured.mean_ratio for measured in rounds]),
            "p50": _median([float(np.percentile(ratio, 50)) for ratio in ratios]),
            "p95": _median([float(np.percentile(ratio, 95)) for ratio in ratios]),
            "max": _median([max(ratio) for ratio in ratios]),
        },
        "pictures_per_s": _median([measured.pictures_per_s for measured in rounds]),
        "latency_ms": percentiles([answer.latency_ms for answer in shorts]),
        "decode_ms": percentiles([answer.timings["decode_ms"] for answer in shorts]),
        "lone_decode_ms": _median(
            [answer.timings["decode_ms"] for measured in rounds for answer in measured.lone]
        ),
        "others_cores": _median([measured.others_cores for measured in rounds]),
    }


def _median(values: Sequence[float]) -> float:
    return round(statistics.median(values), 3)


def _report(rounds: dict[Variant, list[Round]], options: argparse.Namespace) -> str:
    rows = []
    for variant, measured in rounds.items():
        summary = _summary(measured)
        step, ratio, latency = summary["step_ms"], summary["ratio"], summary["latency_ms"]
        rows.append(
            [
                variant.name,
                *(f"{step[name]:.0f}" for name in ("p50", "p95", "max")),
                f"{summary['baseline_ms']:.0f}",
                *(f"{ratio[name]:.2f}" for name in ("mean", "p50", "p95", "max")),
                f"{summary['pictures_per_s']:.2f}",
                *(f"{latency[name]:.0f}" for name in ("p50", "p95")),
                f"{summary['lone_decode_ms']:.0f}",
                f"{summary['others_cores']:.2f}",
            ]
        )
    header = ["decoding", "step p50 ms", "p95", "max", "without", "ratio mean", "p50", "p95", "max"]
    header += ["pictures/s", "latency p50 ms", "p95", "lone ms", "others"]
    return f"""{options.rows} requests of {options.steps} steps, {options.size} pixels, while \
{NUM_SHORTS} at a time are asked for that take one step
without: a step of the same rows while nothing is decoded; ratio: over that
lone: a decoding while nothing else goes on; others: cores that other programs kept busy, \
of {len(os.sched_getaffinity(0))}
ratios are medians of {options.repeats} rounds

{table(header, rows)}"""


def _result(
    rounds: dict[Variant, list[Round]], environment: dict[str, Any], options: argparse.Namespace
) -> dict[str, Any]:
    return {
        "benchmark": "decode",
        "environment": environment,
        "load_average_at_the_end": [round(load, 2) for load in os.getloadavg()],
        "rows": options.rows,
        "steps": options.steps,
        "size": options.size,
        "variants": [
            {
                "name": variant.name,
                "overlap_decode": variant.overlap_decode,
                "vae_threads": variant.threads,
                "vae_nice": variant.nice,
                **_summary(measured),
                "rounds": [one.result() for one in measured],
            }
            for variant, measured in rounds.items()
        ],
    }


if __name__ == "__main__":
    sys.exit(main())
