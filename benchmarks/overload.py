"""Measure what a server does that is asked for three times what it can.

python benchmarks/overload.py [REPOSITORY]
"""
# ruff: noqa: T201  a command prints

import argparse
import contextlib
import itertools
import os
import random
import re
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import attempts
import exposition
from attempts import Attempt, Load
from command import command_parser, positive
from environment import RESULTS, describe, write_result
from measurements import percentiles, table
from processes import CoresUsed, server_processes
from serving import REQUEST_TIMEOUT_S, serving
from variant import repository_with
from workload import Request, make_requests, poisson_arrivals

from darkroom import Client, DarkroomError, EventStream, QueueFull
from darkroom.progress import terminal_progress
from darkroom.server import Server

STEPS = (4, 20)
MAX_ROWS = 16
MAX_QUEUE_SIZE = 16
CLOSED_LOOP = MAX_ROWS + 4
"""Requests in flight that keep all rows full, and the queue from being so."""
RAMP_S = 5.0
"""Until the load is steady."""
SHARE_WITHOUT_DEADLINE = 0.2
DEADLINES = (0.5, 1.0, 2.0, 4.0)
"""Of the others, in times of what a request takes on a server that has just enough to do."""
NUM_THREADS = 160
POLL_S = 0.01


def main() -> int:
    """Run the command; returns the exit status."""
    options = _parse()
    parameters = {"max_rows": MAX_ROWS, "max_queue_size": MAX_QUEUE_SIZE}
    try:
        with (
            repository_with(options.repository, {"stable_diffusion": parameters}) as repository,
            serving(repository) as server,
            Client(server.grpc_url, timeout=REQUEST_TIMEOUT_S) as client,
        ):
            environment = describe(server)
            benchmark = Benchmark(server, client, options)
            result = benchmark.run()
    except (DarkroomError, ValueError, OSError) as error:
        print(f"overload: {error}", file=sys.stderr)
        return 1
    print(f"\n{_report(result)}")
    output = options.output or RESULTS / f"overload-{environment['model']['name']}.json"
    write_result(
        output,
        {
            "benchmark": "overload",
            "environment": environment,
            "load_average_at_the_end": [round(load, 2) for load in os.getloadavg()],
            "seed": options.seed,
            **result,
        },
    )
    print(f"\nwritten: {output}")
    return 0


def _parse() -> argparse.Namespace:
    parser = command_parser(__doc__)
    parser.add_argument(
        "--seconds",
        type=positive,
        default=20,
        metavar="N",
        help="of overload; default: %(default)s",
    )
    parser.add_argument(
        "--factor", type=float, default=3.0, metavar="X", help="of capacity; default: %(default)s"
    )
    parser.add_argument(
        "--trials", type=positive, default=10, metavar="N", help="of hints; default: %(default)s"
    )
    return parser.parse_args()


@dataclass(frozen=True)
class Measured:
    """A load, and what the server did under it."""

    load: Load
    row_steps: float
    """Rows of all its steps, those for nothing too."""
    steps: float
    most: dict[str, float]
    """The most pictures at a time, "waiting" and "running"."""
    cores: dict[str, float]
    """Kept busy by each process at a mean, and by other programs."""

    def result(self) -> dict[str, Any]:
        load = self.load
        lateness = [1000 * (it.sent_s - it.due_s) for it in load.attempts]
        useful = sum(it.num_steps for it in load.having(attempts.IMAGE))
        return {
            "seconds": round(load.seconds, 3),
            "offered_per_s": round(load.offered_per_s, 3),
            "pictures_per_s": round(load.pictures_per_s, 3),
            "steps_per_s": round(load.steps_per_s, 2),
            "outcomes": attempts.counts(load.attempts),
            "latency_ms": percentiles([it.latency_ms for it in load.having(attempts.IMAGE)]),
            "sent_late_ms": percentiles(lateness),
            "row_steps": self.row_steps,
            "useful_share": round(useful / self.row_steps, 4),
            "rows_per_step": round(self.row_steps / self.steps, 2),
            "most": self.most,
            "cores": self.cores,
            "record": attempts.RECORD,
            "attempts": [it.since(load.start_s) for it in load.attempts],
        }


class Benchmark:
    """The three parts: how much the server can, how it refuses more, and how good its hints are."""

    def __init__(self, server: Server, client: Client, options: argparse.Namespace) -> None:
        self._server = server
        self._client = client
        self._options = options
        self._processes = server_processes(server.ports.grpc)

    def run(self) -> dict[str, Any]:
        options = self._options
        with terminal_progress("warming up"):
            self._measure(self._closed_loop, 3.0, 0.0)
        with terminal_progress("capacity"):
            capacity = self._measure(self._closed_loop, RAMP_S + options.seconds / 2, RAMP_S)
        per_s = capacity.load.pictures_per_s
        latency_ms = statistics.median(it.latency_ms for it in capacity.load.pictures)
        with terminal_progress(f"{options.factor:g} times as much"):
            overload = self._measure(
                lambda until_s: self._open_loop(until_s, options.factor * per_s, latency_ms),
                RAMP_S + options.seconds,
                RAMP_S,
            )
        with terminal_progress(f"hints: {options.trials} trials of either kind"):
            hints = Hints(self._client, options.seed).measure(options.trials)
        return {
            "max_rows": MAX_ROWS,
            "max_queue_size": MAX_QUEUE_SIZE,
            "factor": options.factor,
            "capacity": capacity.result(),
            "overload": {**overload.result(), **_against(overload.load, capacity.load)},
            "hints": hints,
        }

    def _measure(
        self, drive: Callable[[float], list[Attempt]], seconds: float, ramp_s: float
    ) -> Measured:
        """Drive a load for some seconds, and wait until all of it is answered."""
        before = exposition.scrape(self._server.metrics_url)
        cores = CoresUsed(self._processes)
        start = time.monotonic()
        with self._watch_gauges() as most:
            made = drive(start + seconds)
        after = exposition.scrape(self._server.metrics_url)

        def grown(name: str) -> float:
            return exposition.total(after, name) - exposition.total(before, name)

        return Measured(
            Load(made, start + ramp_s, start + seconds),
            row_steps=grown("darkroom_batch_rows_sum"),
            steps=grown("darkroom_batch_rows_count"),
            most=most,
            cores=cores.result(),
        )

    def _closed_loop(self, until_s: float) -> list[Attempt]:
        requests = _endless_requests(self._options.seed)

        def ask_again_and_again() -> list[Attempt]:
            made = []
            while (now := time.monotonic()) < until_s:
                made.append(self._ask(next(requests), now, None))
            return made

        with ThreadPoolExecutor(CLOSED_LOOP) as pool:
            loops = [pool.submit(ask_again_and_again) for _ in range(CLOSED_LOOP)]
            return [attempt for loop in loops for attempt in loop.result()]

    def _open_loop(self, until_s: float, per_s: float, latency_ms: float) -> list[Attempt]:
        seed = self._options.seed + 1
        chance = random.Random(seed)
        requests = _endless_requests(seed)
        start = time.monotonic()
        arrivals = poisson_arrivals(per_s, until_s - start, seed=seed)
        with ThreadPoolExecutor(NUM_THREADS) as pool:
            answers = []
            for arrival in arrivals:
                has_deadline = chance.random() >= SHARE_WITHOUT_DEADLINE
                deadline = round(chance.choice(DEADLINES) * latency_ms) if has_deadline else None
                time.sleep(max(0.0, start + arrival - time.monotonic()))
                answers.append(pool.submit(self._ask, next(requests), start + arrival, deadline))
            return [answer.result() for answer in answers]

    def _ask(self, request: Request, due_s: float, timeout_ms: int | None) -> Attempt:
        sent = time.monotonic()
        outcome, hint, is_queue_full = attempts.IMAGE, None, False
        try:
            self._client.generate(request.prompt, **request.options(), timeout_ms=timeout_ms)
        except DarkroomError as error:
            outcome = attempts.outcome_of(error)
            # Anything else says that the server is broken, and ends the benchmark.
            if outcome not in (attempts.REJECTED, attempts.EXPIRED):
                raise
            if isinstance(error, QueueFull):
                hint = _hint_ms(error)
                is_queue_full = "queue is full" in str(error)
        answered = time.monotonic()
        return Attempt(
            *(due_s, sent, answered, request.num_inference_steps, timeout_ms, outcome),
            *(hint, is_queue_full),
        )

    @contextlib.contextmanager
    def _watch_gauges(self) -> Iterator[dict[str, float]]:
        """The most that was seen of waiting and running pictures, a few times a second."""
        most = {"waiting": 0.0, "running": 0.0}
        is_over = threading.Event()

        def watch() -> None:
            while not is_over.wait(0.2):
                series = exposition.scrape(self._server.metrics_url)
                for name, value in most.items():
                    now = exposition.total(series, f"darkroom_{name}_pictures")
                    most[name] = max(value, now)

        with ThreadPoolExecutor(1) as pool:
            watching = pool.submit(watch)
            try:
                yield most
            finally:
                is_over.set()
        watching.result()


class Hints:
    """After which time there was room, against what the refusal said, on an otherwise idle server.

    Nobody else asks meanwhile: under load, the room that a hint tells of may be taken by others.
    """

    def __init__(self, client: Client, seed: int) -> None:
        self._client = client
        self._chance = random.Random(seed)
        self._requests = _endless_requests(seed + 2)

    def measure(self, trials: int) -> list[dict[str, Any]]:
        return [
            trial()
            for _ in range(trials)
            for trial in (self._until_there_is_a_place, self._until_there_is_time)
        ]

    def _until_there_is_a_place(self) -> dict[str, Any]:
        with contextlib.ExitStack() as stack:
            while True:
                request = next(self._requests)
                try:
                    stack.enter_context(self._open(request))
                except QueueFull as refusal:
                    refused = time.monotonic()
                    accepted = stack.enter_context(self._open_as_soon_as_possible(request))
                    room_ms = 1000 * (time.monotonic() - refused)
                    accepted.close()
                    return {
                        "refused_for": "place",
                        "hint_ms": _hint_ms(refusal),
                        "room_ms": round(room_ms, 1),
                    }

    def _until_there_is_time(self) -> dict[str, Any]:
        with contextlib.ExitStack() as stack:
            for _ in range(MAX_ROWS + self._chance.randint(0, MAX_QUEUE_SIZE - 2)):
                accepted = self._open_as_soon_as_possible(next(self._requests))
                stack.enter_context(accepted)
            request = next(self._requests)
            needed_ms = self._needed_ms(request)
            timeout_ms = max(2, round(self._chance.uniform(0.3, 0.9) * needed_ms))
            refused = time.monotonic()
            try:
                hint, accepted = 0, self._open(request, timeout_ms)
            except QueueFull as refusal:
                hint = _hint_ms(refusal)
                accepted = self._open_as_soon_as_possible(request, timeout_ms)
            room_ms = 1000 * (time.monotonic() - refused)
            return {
                "refused_for": "time",
                "timeout_ms": timeout_ms,
                "needed_ms": needed_ms,
                "hint_ms": hint,
                "room_ms": round(room_ms, 1),
                "then": _end_of(accepted),
            }

    def _needed_ms(self, request: Request) -> int:
        """How much time the server wants for a request, which is not queued."""
        while True:
            try:
                self._open(request, 1).close()
            except QueueFull as refusal:
                match = re.search(r"about (\d+) ms of work", str(refusal))
                if match:
                    return int(match[1])
                # There is no place yet, of those that were just sent.
                time.sleep(POLL_S)
            else:
                raise ValueError("a deadline of 1 ms was accepted behind a full batch")

    def _open(self, request: Request, timeout_ms: int | None = None) -> EventStream:
        """A stream that was accepted; raises QueueFull."""
        stream = self._client.stream(request.prompt, **request.options(), timeout_ms=timeout_ms)
        next(stream)
        return stream

    def _open_as_soon_as_possible(
        self, request: Request, timeout_ms: int | None = None
    ) -> EventStream:
        while True:
            with contextlib.suppress(QueueFull):
                return self._open(request, timeout_ms)
            time.sleep(POLL_S)


def _end_of(stream: EventStream) -> str:
    try:
        for _ in stream:
            pass
    except DarkroomError as error:
        return attempts.outcome_of(error)
    return attempts.IMAGE


def _hint_ms(error: QueueFull) -> int:
    if error.retry_after_s is None:
        raise ValueError(f"a refusal without a hint: {error}")
    return round(1000 * error.retry_after_s)


def _endless_requests(seed: int) -> Iterator[Request]:
    """Safe for threads: `next` of a count is one call."""
    requests = make_requests(600, seed=seed, steps=STEPS, guidance_scales=(1.0,))
    numbers = itertools.count()
    return _Cycle(requests, numbers)


class _Cycle(Iterator[Request]):
    """As itertools.cycle, for many threads."""

    def __init__(self, requests: list[Request], numbers: Iterator[int]) -> None:
        self._requests = requests
        self._numbers = numbers

    def __next__(self) -> Request:
        return self._requests[next(self._numbers) % len(self._requests)]


def _against(load: Load, capacity: Load) -> dict[str, Any]:
    refusals = load.having(attempts.REJECTED)
    full = [it for it in refusals if it.is_queue_full]
    in_time = load.share_in_time
    return {
        "goodput_ratio": round(load.pictures_per_s / capacity.pictures_per_s, 3),
        "work_ratio": round(load.steps_per_s / capacity.steps_per_s, 3),
        "refused_after_ms": {
            **percentiles([it.latency_ms for it in refusals]),
            "max": round(max(it.latency_ms for it in refusals), 3),
        },
        "refused_for_place": len(full),
        "refused_for_time": len(refusals) - len(full),
        "share_in_time": None if in_time is None else round(in_time, 4),
    }


def _report(result: dict[str, Any]) -> str:
    capacity, overload = result["capacity"], result["overload"]
    rows = [
        [
            name,
            f"{load['offered_per_s']:.1f}",
            f"{load['pictures_per_s']:.2f}",
            f"{load['steps_per_s']:.1f}",
            f"{load['rows_per_step']:.1f}",
            f"{100 * load['useful_share']:.1f}",
            *(f"{load['latency_ms'][rank]:.0f}" for rank in ("p50", "p99")),
            *(f"{load['most'][gauge]:.0f}" for gauge in ("waiting", "running")),
            *(f"{load['cores'][name]:.2f}" for name in ("stable_diffusion", "client", "others")),
        ]
        for name, load in (("capacity", capacity), ("overload", overload))
    ]
    header = ["load", "requests/s", "pictures/s", "steps/s", "rows", "useful %"]
    header += ["p50 ms", "p99 ms", "most waiting", "running"]
    header += ["engine", "client", "others"]
    refused, outcomes = overload["refused_after_ms"], overload["outcomes"]
    in_time = overload["share_in_time"]
    in_time = "none" if in_time is None else f"{100 * in_time:.1f} %"
    return f"""{table(header, rows)}

outcomes under overload: {outcomes}
goodput over capacity: {overload["goodput_ratio"]:.2f} in pictures, \
{overload["work_ratio"]:.2f} in steps
refused after p50 {refused["p50"]:.1f}, p99 {refused["p99"]:.1f}, max {refused["max"]:.1f} ms: \
{overload["refused_for_place"]} for want of a place, {overload["refused_for_time"]} of time
of those accepted with a deadline, in time: {in_time}

{_hints_report(result["hints"])}"""


def _hints_report(hints: list[dict[str, Any]]) -> str:
    rows = []
    for kind in ("place", "time"):
        trials = [trial for trial in hints if trial["refused_for"] == kind]
        hint, room = ([trial[name] for trial in trials] for name in ("hint_ms", "room_ms"))
        ratios = [trial["room_ms"] / trial["hint_ms"] for trial in trials if trial["hint_ms"]]
        if not ratios:
            continue
        kept = [trial["then"] for trial in trials if "then" in trial]
        rows.append(
            [
                f"want of {kind}",
                str(len(trials)),
                f"{statistics.median(hint):.0f}",
                f"{statistics.median(room):.0f}",
                f"{statistics.median(ratios):.2f}",
                f"{sum(ratio <= 1 for ratio in ratios)} of {len(ratios)}",
                f"{kept.count(attempts.IMAGE)} of {len(kept)}" if kept else "",
            ]
        )
    header = [
        "refused for",
        "trials",
        "hint ms",
        "room after ms",
        "ratio",
        "of trials",
        "then kept",
    ]
    return table(header, rows)


if __name__ == "__main__":
    sys.exit(main())
