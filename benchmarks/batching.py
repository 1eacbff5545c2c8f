"""Measure what step-level continuous batching gives: throughput, waiting time, joining.

python benchmarks/batching.py [REPOSITORY]
"""
# ruff: noqa: T201  a command prints

import argparse
import random
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from environment import RESULTS, ROOT, describe, write_result
from measurements import Answer, Join, Round, percentiles, table
from workload import Request, make_requests

from darkroom import Client, DarkroomError, Picture
from darkroom.progress import terminal_progress
from darkroom.server import Server, free_ports

NUM_REQUESTS = 16
EQUAL_STEPS = (20, 20)
MIXED_STEPS = (4, 40)
MIXED_GUIDANCE = (0.0, 1.0, 7.0)
LONG_STEPS = 60
SHORT_STEPS = 4
MAX_DELAY_STEPS = 2
# A short request is sent when this fraction of the long one has passed, at the least and the most.
ARRIVAL = (0.1, 0.6)

Pictures = list[Picture]


def main() -> int:
    """Run the command; returns the exit status."""
    options = _parse()
    try:
        with (
            Server(options.repository, free_ports(), terminal_progress) as server,
            Client(server.grpc_url) as client,
        ):
            environment = describe(server)
            comparisons = [
                _compare(client, workload, options.repeats) for workload in _workloads(options.seed)
            ]
            joins = _join(client, options.trials, options.seed)
    except DarkroomError as error:
        print(f"batching: {error}", file=sys.stderr)
        return 1
    join = _join_result(joins)
    print(f"\n{_comparison_report(comparisons)}\n\n{_join_report(join)}")
    output = options.output or RESULTS / f"batching-{environment['model']['name']}.json"
    write_result(
        output,
        {
            "benchmark": "batching",
            "environment": environment,
            "seed": options.seed,
            "comparisons": [comparison.result() for comparison in comparisons],
            "join": join,
        },
    )
    print(f"\nwritten: {output}")
    return 0


@dataclass(frozen=True)
class Workload:
    """Requests to be sent one after the other and all at once."""

    name: str
    requests: list[Request]


@dataclass(frozen=True)
class Comparison:
    """The same requests in a row, which is the baseline, and at once, some times in turn."""

    workload: Workload
    in_a_row: list[Round]
    at_once: list[Round]
    max_pixel_difference: int
    """Between the two pictures of a request, of 255."""

    @property
    def ratios(self) -> list[float]:
        """The time in a row over the time at once, of rounds next to each other."""
        pairs = zip(self.in_a_row, self.at_once, strict=True)
        return [row.wall_s / once.wall_s for row, once in pairs]

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)

    def result(self) -> dict[str, Any]:
        return {
            "name": self.workload.name,
            "requests": [asdict(request) for request in self.workload.requests],
            "ratio": round(self.ratio, 3),
            "ratios": [round(ratio, 3) for ratio in self.ratios],
            "max_pixel_difference": self.max_pixel_difference,
            "in_a_row": [measured.result() for measured in self.in_a_row],
            "at_once": [measured.result() for measured in self.at_once],
        }


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("repository", nargs="?", type=Path, default=ROOT / "build" / "shapes")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--trials", type=int, default=20, metavar="N", help="of joining; default: %(default)s"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the workloads")
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: in results/")
    return parser.parse_args()


def _workloads(seed: int) -> list[Workload]:
    equal = make_requests(NUM_REQUESTS, seed=seed, steps=EQUAL_STEPS, guidance_scales=(0.0,))
    mixed = make_requests(
        NUM_REQUESTS, seed=seed, steps=MIXED_STEPS, guidance_scales=MIXED_GUIDANCE
    )
    return [
        Workload("20 steps, guidance 0", equal),
        Workload("4 to 40 steps, guidance 0, 1 and 7", mixed),
    ]


def _compare(client: Client, workload: Workload, repeats: int) -> Comparison:
    requests = workload.requests
    with terminal_progress(f"{workload.name}: warming up"):
        # The prompts' embeddings, and the networks at the sizes of batch that come up.
        _send_at_once(client, requests)
    in_a_row: list[tuple[Round, Pictures]] = []
    at_once: list[tuple[Round, Pictures]] = []
    for repeat in range(1, repeats + 1):
        with terminal_progress(f"{workload.name}: round {repeat} of {repeats}"):
            in_a_row.append(_send_in_a_row(client, requests))
            at_once.append(_send_at_once(client, requests))
    pairs = zip(in_a_row[0][1], at_once[0][1], strict=True)
    return Comparison(
        workload,
        [measured for measured, _ in in_a_row],
        [measured for measured, _ in at_once],
        max(_pixel_difference(*pair) for pair in pairs),
    )


def _join(client: Client, trials: int, seed: int) -> list[Join]:
    chance = random.Random(seed)
    longs, shorts = (
        make_requests(trials + 1, seed=seed + n, steps=(steps, steps), guidance_scales=(7.0,))
        for n, steps in enumerate((LONG_STEPS, SHORT_STEPS))
    )
    with terminal_progress("joining: warming up"):
        _send_at_once(client, [longs.pop(), shorts.pop()])
        # Alone, which tells how long the next ones will take.
        alone, _ = _send(client, longs[0])
    joins = []
    with terminal_progress(f"joining: {trials} trials"), ThreadPoolExecutor(1) as pool:
        for long, short in zip(longs, shorts, strict=True):
            running = pool.submit(_send, client, long)
            time.sleep(chance.uniform(*ARRIVAL) * alone.latency_ms / 1000)
            short_answer, _ = _send(client, short)
            long_answer, _ = running.result()
            joins.append(Join(long_answer, short_answer, LONG_STEPS))
    return joins


def _send(client: Client, request: Request) -> tuple[Answer, Picture]:
    sent = time.monotonic()
    picture = client.generate(request.prompt, **request.options())
    return Answer(sent, time.monotonic(), picture.timings, picture.queue_steps), picture


def _send_in_a_row(client: Client, requests: Sequence[Request]) -> tuple[Round, Pictures]:
    return _split([_send(client, request) for request in requests])


def _send_at_once(client: Client, requests: Sequence[Request]) -> tuple[Round, Pictures]:
    start = threading.Barrier(len(requests))

    def send(request: Request) -> tuple[Answer, Picture]:
        start.wait()
        return _send(client, request)

    with ThreadPoolExecutor(len(requests)) as pool:
        return _split(list(pool.map(send, requests)))


def _split(answers: list[tuple[Answer, Picture]]) -> tuple[Round, Pictures]:
    return Round([answer for answer, _ in answers]), [picture for _, picture in answers]


def _pixel_difference(one: Picture, other: Picture) -> int:
    return int(np.abs(np.asarray(one, np.int16) - np.asarray(other, np.int16)).max())


def _join_result(joins: list[Join]) -> dict[str, Any]:
    delays = [join.delay_steps for join in joins]
    return {
        "long_steps": LONG_STEPS,
        "short_steps": SHORT_STEPS,
        "max_delay_steps": MAX_DELAY_STEPS,
        "trials": len(joins),
        "overlapping": sum(join.is_overlapping for join in joins),
        "max_queue_steps": max(join.short.queue_steps for join in joins),
        "within": sum(join.short.queue_steps <= MAX_DELAY_STEPS for join in joins),
        "delay_steps": {**percentiles(delays), "max": round(max(delays), 3)},
        "step_ms": round(statistics.median(join.step_ms for join in joins), 3),
        "raw": [
            {
                "delay_steps": round(join.delay_steps, 3),
                "step_ms": round(join.step_ms, 3),
                "long": join.long.since(join.long.sent_s),
                "short": join.short.since(join.long.sent_s),
            }
            for join in joins
        ],
    }


def _comparison_report(comparisons: list[Comparison]) -> str:
    rows = []
    for comparison in comparisons:
        for name, rounds in (("in a row", comparison.in_a_row), ("at once", comparison.at_once)):
            is_baseline = rounds is comparison.in_a_row
            # The round in the middle, so that the numbers of a line belong together.
            middle = sorted(rounds, key=lambda measured: measured.wall_s)[len(rounds) // 2]
            wait = middle.wait_ms()
            rows.append(
                [
                    f"{NUM_REQUESTS} x {comparison.workload.name}, {name}",
                    f"{middle.wall_s:.2f}",
                    f"{middle.pictures_per_s:.2f}",
                    f"{wait['p50'] / 1000:.2f}",
                    f"{wait['p95'] / 1000:.2f}",
                    "1.00" if is_baseline else f"{comparison.ratio:.2f}",
                    "" if is_baseline else " ".join(f"{r:.2f}" for r in comparison.ratios),
                    "" if is_baseline else str(comparison.max_pixel_difference),
                ]
            )
    header = ["requests", "wall s", "pictures/s", "wait p50 s", "wait p95 s", "ratio", "of rounds"]
    return table([*header, "pixels differ by"], rows)


def _join_report(join: dict[str, Any]) -> str:
    delay = join["delay_steps"]
    return (
        f"joining: a request of {SHORT_STEPS} steps arrives while one of {LONG_STEPS} runs; "
        f"{join['trials']} trials, {join['overlapping']} of them overlapping\n"
        f"its first step begins after p50 {delay['p50']:.2f}, p95 {delay['p95']:.2f}, "
        f"max {delay['max']:.2f} times the {join['step_ms']:.1f} ms of a step;\n"
        f"by count, at most {join['max_queue_steps']} steps of others began before it, "
        f"within {MAX_DELAY_STEPS}: {join['within']} of {join['trials']}"
    )


if __name__ == "__main__":
    sys.exit(main())
