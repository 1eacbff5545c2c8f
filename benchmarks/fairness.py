"""Measure who waits for whom when all rows are taken: short requests, and urgent ones.

python benchmarks/fairness.py [REPOSITORY]
"""
# ruff: noqa: T201  a command prints

import argparse
import os
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from command import command_parser, positive
from environment import RESULTS, describe, write_result
from measurements import Answer, percentiles, table
from processes import CoresUsed, server_processes
from queueing import Arrival, first_come_first_served
from serving import REQUEST_TIMEOUT_S, serving
from variant import repository_with
from workload import Request, make_requests

from darkroom import Client, DarkroomError
from darkroom.progress import terminal_progress

MAX_ROWS = 4
GUIDANCE = (1.0,)
LONG_STEPS = 150
NUM_LONGS = 6
SHORT_STEPS = 4
# When this fraction of the long ones' time has passed, the first short one is sent.
FIRST_SHORT = 0.1

SECONDS_PER_PRIORITY = 2
PRIORITY_STEPS = 20
NUM_LOWS = 8
NUM_HIGHS_AT_ONCE = 8
HIGH_SECONDS = 20.0
"""The high ones come for much longer than their head start lasts."""
PRIORITIES = (-1, 1)


def main() -> int:
    """Run the command; returns the exit status."""
    options = _parse()
    settings = {"max_rows": MAX_ROWS, "seconds_per_priority": SECONDS_PER_PRIORITY}
    try:
        with (
            repository_with(options.repository, {"stable_diffusion": settings}) as repository,
            serving(repository) as server,
            Client(server.grpc_url, timeout=REQUEST_TIMEOUT_S) as client,
        ):
            environment = describe(server)
            cores = CoresUsed(server_processes(server.ports.grpc))
            benchmark = Benchmark(client, options.seed)
            benchmark.warm_up()
            shorts = benchmark.shorts_among_longs(options.repeats, options.shorts)
            priorities = benchmark.priorities()
            used = cores.result()
    except (DarkroomError, ValueError, OSError) as error:
        print(f"fairness: {error}", file=sys.stderr)
        return 1
    print(f"\n{_shorts_report(shorts)}\n\n{_priorities_report(priorities)}")
    output = options.output or RESULTS / f"fairness-{environment['model']['name']}.json"
    write_result(
        output,
        {
            "benchmark": "fairness",
            "environment": environment,
            "load_average_at_the_end": [round(load, 2) for load in os.getloadavg()],
            "cores": used,
            "seed": options.seed,
            "shorts_among_longs": shorts,
            "priorities": priorities,
        },
    )
    print(f"\nwritten: {output}")
    return 0


def _parse() -> argparse.Namespace:
    parser = command_parser(__doc__)
    parser.add_argument(
        "--repeats", type=positive, default=3, metavar="N", help="default: %(default)s"
    )
    parser.add_argument(
        "--shorts",
        type=positive,
        default=20,
        metavar="N",
        help="short requests of a round; default: %(default)s",
    )
    return parser.parse_args()


class Benchmark:
    """Both parts, on one server."""

    def __init__(self, client: Client, seed: int) -> None:
        self._client = client
        self._seed = seed

    def warm_up(self) -> None:
        """The networks at the sizes of batch that come up."""
        requests = self._requests(2 * MAX_ROWS, SHORT_STEPS)
        with terminal_progress("warming up"), ThreadPoolExecutor(len(requests)) as pool:
            list(pool.map(self._ask, requests))

    def shorts_among_longs(self, repeats: int, num_shorts: int) -> list[dict[str, Any]]:
        """Rounds of long requests alone, and with short ones beside them, in turn."""
        rounds = []
        for repeat in range(1, repeats + 1):
            with terminal_progress(f"long requests alone: round {repeat} of {repeats}"):
                alone, _ = self._run_longs(0, 0.0)
            with terminal_progress(f"short ones among them: round {repeat} of {repeats}"):
                long_s = _wall_s(alone)
                longs, shorts = self._run_longs(num_shorts, FIRST_SHORT * long_s)
            rounds.append(_shorts_round(alone, longs, shorts))
        return rounds

    def priorities(self) -> list[dict[str, Any]]:
        """Low ones queue, then high ones come without end; with priorities, and without."""
        results = []
        for low, high in (PRIORITIES, (0, 0)):
            with terminal_progress(f"priorities {low} and {high}"):
                lows, highs = self._run_priorities(low, high)
            start = min(answer.sent_s for answer in lows)
            results.append(
                {
                    "low": low,
                    "high": high,
                    "low_wait_ms": _waits(lows),
                    "high_wait_ms": _waits(highs),
                    "lows_sent": NUM_LOWS,
                    "lows_finished": len(lows),
                    "highs_after_the_last_low": sum(
                        answer.answered_s > max(it.answered_s for it in lows) for answer in highs
                    ),
                    "lows": [answer.since(start) for answer in lows],
                    "highs": [answer.since(start) for answer in highs],
                }
            )
        return results

    def _run_longs(
        self, num_shorts: int, first_short_s: float
    ) -> tuple[list[Answer], list[Answer]]:
        requests = self._requests(NUM_LONGS, LONG_STEPS)
        with ThreadPoolExecutor(NUM_LONGS) as pool:
            longs = [pool.submit(self._ask, request) for request in requests]
            time.sleep(first_short_s)
            shorts = []
            for request in self._requests(num_shorts, SHORT_STEPS):
                # The later ones would find free rows.
                if any(long.done() for long in longs):
                    break
                shorts.append(self._ask(request))
            return [long.result() for long in longs], shorts

    def _run_priorities(self, low: int, high: int) -> tuple[list[Answer], list[Answer]]:
        requests = self._requests(NUM_LOWS + MAX_ROWS, PRIORITY_STEPS)
        is_over = threading.Event()
        with ThreadPoolExecutor(len(requests) + NUM_HIGHS_AT_ONCE) as pool:
            # The first ones have the rows when the low ones arrive.
            first = [pool.submit(self._ask, request, high) for request in requests[:MAX_ROWS]]
            time.sleep(0.1)
            lows = [pool.submit(self._ask, request, low) for request in requests[MAX_ROWS:]]
            loops = [
                pool.submit(self._ask_again_and_again, high, number, is_over)
                for number in range(NUM_HIGHS_AT_ONCE)
            ]
            time.sleep(HIGH_SECONDS)
            is_over.set()
            highs = [answer for loop in loops for answer in loop.result()]
            _results(first)
            return _results(lows), highs

    def _ask_again_and_again(
        self, priority: int, number: int, is_over: threading.Event
    ) -> list[Answer]:
        request = self._requests(NUM_HIGHS_AT_ONCE, PRIORITY_STEPS)[number]
        answers = []
        while not is_over.is_set():
            answers.append(self._ask(request, priority))
        return answers

    def _ask(self, request: Request, priority: int = 0) -> Answer:
        sent = time.monotonic()
        picture = self._client.generate(request.prompt, **request.options(), priority=priority)
        return Answer(sent, time.monotonic(), picture.timings, picture.queue_steps)

    def _requests(self, count: int, steps: int) -> list[Request]:
        return make_requests(count, seed=self._seed, steps=(steps, steps), guidance_scales=GUIDANCE)


def _results(futures: Sequence[Future[Answer]]) -> list[Answer]:
    return [future.result() for future in futures]


def _wall_s(answers: Sequence[Answer]) -> float:
    return max(it.answered_s for it in answers) - min(it.sent_s for it in answers)


def _waits(answers: Sequence[Answer]) -> dict[str, float]:
    """Percentiles of the time until the first step, in ms."""
    waits = [answer.timings["queue_ms"] for answer in answers]
    return {**percentiles(waits), "max": round(max(waits), 3)}


def _shorts_round(alone: list[Answer], longs: list[Answer], shorts: list[Answer]) -> dict[str, Any]:
    start = min(answer.sent_s for answer in longs)
    # All rows are taken until the first long one ends, which has made a step in every turn.
    first = min(alone, key=lambda answer: answer.answered_s)
    step_s = first.timings["denoise_ms"] / 1000 / LONG_STEPS
    arrivals = [
        *(Arrival(answer.sent_s - start, LONG_STEPS) for answer in longs),
        *(Arrival(answer.sent_s - start, SHORT_STEPS) for answer in shorts),
    ]
    # Each short one on its own: the others before it would not even have been sent.
    served = [
        first_come_first_served([*arrivals[:NUM_LONGS], arrival], MAX_ROWS, step_s)[-1]
        - arrival.at_s
        for arrival in arrivals[NUM_LONGS:]
    ]
    added_steps = len(shorts) * SHORT_STEPS
    return {
        "step_ms": round(1000 * step_s, 3),
        "shorts": len(shorts),
        "queue_steps": [answer.queue_steps for answer in shorts],
        "wait_ms": _waits(shorts),
        "latency_ms": percentiles([answer.latency_ms for answer in shorts]),
        "first_come_first_served_wait_ms": percentiles([1000 * wait for wait in served]),
        "stretch": round(_wall_s(longs) / _wall_s(alone), 4),
        "added_work": round(1 + added_steps / (NUM_LONGS * LONG_STEPS), 4),
        "longs_alone": [answer.since(min(it.sent_s for it in alone)) for answer in alone],
        "longs": [answer.since(start) for answer in longs],
        "raw": [
            {**answer.since(start), "first_come_first_served_ms": round(1000 * wait, 1)}
            for answer, wait in zip(shorts, served, strict=True)
        ],
    }


def _shorts_report(rounds: list[dict[str, Any]]) -> str:
    each = [
        [
            str(number),
            f"{raw['queue_steps']}",
            f"{raw['queue_ms']:.0f}",
            f"{raw['total_ms']:.0f}",
            f"{raw['first_come_first_served_ms']:.0f}",
        ]
        for number, raw in enumerate(rounds[0]["raw"], 1)
    ]
    rows = [
        [
            str(number),
            str(one["shorts"]),
            str(max(one["queue_steps"])),
            *(f"{one['wait_ms'][name]:.0f}" for name in ("p50", "p95", "max")),
            f"{one['latency_ms']['p50']:.0f}",
            f"{one['first_come_first_served_wait_ms']['p50']:.0f}",
            f"{one['stretch']:.3f}",
            f"{one['added_work']:.3f}",
            f"{one['step_ms']:.1f}",
        ]
        for number, one in enumerate(rounds, 1)
    ]
    short_header = ["short of round 1", "steps waited", "wait ms", "total ms", "FCFS wait ms"]
    header = ["round", "shorts", "most steps waited", "wait p50 ms", "p95", "max", "latency p50 ms"]
    header += ["FCFS wait p50 ms", "stretch", "added work", "step ms"]
    stretch = statistics.median(one["stretch"] for one in rounds)
    return (
        f"{NUM_LONGS} requests of {LONG_STEPS} steps on {MAX_ROWS} rows, and among them others of "
        f"{SHORT_STEPS}, one after the other\n\n"
        f"{table(short_header, each)}"
        f"\n\n{table(header, rows)}\n\n"
        f"the long ones took {stretch:.3f} times as long as alone, median of the rounds"
    )


def _priorities_report(results: list[dict[str, Any]]) -> str:
    rows = [
        [
            f"{result['low']} and {result['high']}",
            *(f"{result['low_wait_ms'][name]:.0f}" for name in ("p50", "max")),
            *(f"{result['high_wait_ms'][name]:.0f}" for name in ("p50", "p95", "max")),
            f"{result['lows_finished']} of {result['lows_sent']}",
            str(result["highs_after_the_last_low"]),
        ]
        for result in results
    ]
    header = ["priorities", "low wait p50 ms", "max", "high wait p50 ms", "p95", "max"]
    header += ["lows finished", "highs after the last"]
    return (
        f"{NUM_LOWS} requests of low priority queue; {NUM_HIGHS_AT_ONCE} at a time of high "
        f"priority come for {HIGH_SECONDS:g} s, all of {PRIORITY_STEPS} steps;\n"
        f"a level of priority counts as {SECONDS_PER_PRIORITY} s\n\n{table(header, rows)}"
    )


if __name__ == "__main__":
    sys.exit(main())
