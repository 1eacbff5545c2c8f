"""Send thousands of small requests, and see that each is answered once and memory stays flat.

python benchmarks/soak.py [REPOSITORY]
"""
# ruff: noqa: T201  a command prints

import argparse
import contextlib
import itertools
import os
import random
import sys
import threading
import time
import uuid
from collections import Counter
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import Any, Self

import attempts
import exposition
import processes
from command import command_parser, positive
from environment import RESULTS, describe, write_result
from ledger import CLOSED, disagreements, growth
from measurements import table
from processes import CoresUsed, server_processes
from serving import REQUEST_TIMEOUT_S, serving

from darkroom import Client, DarkroomError, Done, EventStream, Options, Queued
from darkroom.progress import terminal_progress
from darkroom.server import ServeError, Server

SIZE = 64
MAX_STEPS = 3
LONG_STEPS = 100
"""Of what is to be cancelled."""
DEADLINE_STEPS = 20
MAX_TIMEOUT_DIGITS = 3.5
"""Deadlines are from 1 ms to 10 to this power."""
AT_A_TIME = 16
PROMPTS = 100
"""Different ones: the cache of their embeddings no longer grows when a quarter is done."""
KINDS = {
    "unary over gRPC": 0.30,
    "unary over HTTP": 0.18,
    "streamed over gRPC": 0.15,
    "streamed over HTTP": 0.07,
    "closed, gRPC": 0.05,
    "closed, HTTP": 0.05,
    "cancelled by id, streamed": 0.05,
    "cancelled by id, unary": 0.05,
    "invalid": 0.05,
    "with a deadline": 0.05,
}
"""The share of each kind of request."""
INVALID: tuple[Options, ...] = (
    {"num_inference_steps": 0},
    {"width": SIZE + 1},
    {"sampler": "none such"},
    {"guidance_scale": -1.0},
    {"timeout_ms": 0},
)
NUM_SAMPLES = 150
"""Of memory, about."""
SETTLE_TIMEOUT_S = 10.0


def main() -> int:
    """Run the command; returns the exit status: 1 also if a request was not answered once."""
    options = _parse()
    try:
        with serving(options.repository) as server, Soak(server, options) as soak:
            environment = describe(server)
            result = soak.run()
    except (DarkroomError, OSError) as error:
        print(f"soak: {error}", file=sys.stderr)
        return 1
    print(f"\n{_report(result)}")
    output = options.output or RESULTS / f"soak-{environment['model']['name']}.json"
    write_result(
        output,
        {
            "benchmark": "soak",
            "environment": environment,
            "load_average_at_the_end": [round(load, 2) for load in os.getloadavg()],
            "seed": options.seed,
            **result,
        },
    )
    print(f"\nwritten: {output}")
    return 1 if result["disagreements"] else 0


def _parse() -> argparse.Namespace:
    parser = command_parser(__doc__)
    parser.add_argument(
        "--requests", type=positive, default=2000, metavar="N", help="default: %(default)s"
    )
    parser.add_argument(
        "--kind",
        action="append",
        choices=list(KINDS),
        metavar="KIND",
        help=f"only these, to find out which one leaks: {', '.join(KINDS)}",
    )
    return parser.parse_args()


class Soak:
    """A server, clients over both protocols, and what became of their requests."""

    def __init__(self, server: Server, options: argparse.Namespace) -> None:
        self._server = server
        self._options = options
        self._grpc = Client(server.grpc_url, timeout=REQUEST_TIMEOUT_S)
        self._http = Client(server.http_url, timeout=REQUEST_TIMEOUT_S)
        # Both of a request that is cancelled by id have a thread.
        self._helpers = ThreadPoolExecutor(AT_A_TIME)
        self._outcomes: dict[str, Counter[str]] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._helpers.shutdown()
        self._grpc.close()
        self._http.close()

    def run(self) -> dict[str, Any]:
        """Send all requests.

        Raises:
            ServeError: the server or one of its processes died.
            DarkroomError: it does not answer.
        """
        names = server_processes(self._server.ports.grpc)
        before = self._counted()
        cores = CoresUsed(names)
        start = time.monotonic()
        memory = MemorySeries(names, self._options.requests)
        with terminal_progress(f"{self._options.requests} requests, {AT_A_TIME} at a time"):
            self._send_all(memory)
        wall_s = time.monotonic() - start
        by_kind = {kind: dict(sorted(counts.items())) for kind, counts in self._outcomes.items()}
        seen = sum(self._outcomes.values(), Counter())
        counted = self._settled(before, sum(seen.values()))
        return {
            "requests": sum(seen.values()),
            "requests_per_s": round(sum(seen.values()) / wall_s, 2),
            "cores": cores.result(),
            "outcomes": by_kind,
            "seen": dict(seen),
            "counted": counted,
            "disagreements": disagreements(seen, counted),
            "memory_kb": memory.growth(),
            "series": memory.series,
        }

    def _send_all(self, memory: "MemorySeries") -> None:
        chance = random.Random(self._options.seed)
        kinds = self._options.kind or list(KINDS)
        chosen = chance.choices(kinds, [KINDS[kind] for kind in kinds], k=self._options.requests)
        numbered = iter(enumerate(chosen))
        lock = threading.Lock()

        def send_again_and_again() -> None:
            while True:
                with lock:
                    number, kind = next(numbered, (0, None))
                if kind is None:
                    return
                outcome = self._send(kind, random.Random(f"{self._options.seed} {number}"))
                with self._lock:
                    self._outcomes.setdefault(kind, Counter())[outcome] += 1
                    memory.tick()

        with ThreadPoolExecutor(AT_A_TIME) as pool:
            loops = [pool.submit(send_again_and_again) for _ in range(AT_A_TIME)]
            while wait(loops, timeout=1.0, return_when=FIRST_EXCEPTION).not_done:
                self._server.check()
                if dead := self._server.dead_stubs():
                    raise ServeError(f"died: {', '.join(dead.values())}")
                _raise_first_error(loops)
        _raise_first_error(loops)

    def _send(self, kind: str, chance: random.Random) -> str:
        """Send one request; returns its outcome."""
        what, _, how = kind.partition(", " if "," in kind else " over ")
        prompt = f"a large red circle, number {chance.randrange(PROMPTS)}"
        options: Options = {
            "seed": chance.randrange(2**32),
            "width": SIZE,
            "height": SIZE,
            "num_inference_steps": chance.randint(1, MAX_STEPS),
            "guidance_scale": chance.choice((1.0, 7.5)),
        }
        client = self._http if "HTTP" in kind else self._grpc
        try:
            match what:
                case "unary":
                    client.generate(prompt, **options)
                case "streamed":
                    return _read_to_the_end(client.stream(prompt, preview_interval=1, **options))
                case "closed":
                    options["num_inference_steps"] = LONG_STEPS
                    with client.stream(prompt, **options) as events:
                        for _ in itertools.islice(events, chance.randint(1, 4)):
                            pass
                    return CLOSED
                case "cancelled by id":
                    options["num_inference_steps"] = LONG_STEPS
                    return self._cancel_by_id(prompt, options, is_streamed=how == "streamed")
                case "invalid":
                    self._either(chance).generate(prompt, **{**options, **chance.choice(INVALID)})
                case "with a deadline":
                    options["num_inference_steps"] = DEADLINE_STEPS
                    # Refused at once, run out later, or just enough.
                    options["timeout_ms"] = round(10 ** chance.uniform(0.0, MAX_TIMEOUT_DIGITS))
                    self._either(chance).generate(prompt, **options)
        except DarkroomError as error:
            outcome = attempts.outcome_of(error)
            if outcome == attempts.UNANSWERED:
                raise
            return outcome
        return attempts.IMAGE

    def _either(self, chance: random.Random) -> Client:
        return chance.choice((self._grpc, self._http))

    def _cancel_by_id(self, prompt: str, options: Options, *, is_streamed: bool) -> str:
        request_id = uuid.uuid4().hex
        if is_streamed:
            stream = self._grpc.stream(prompt, request_id=request_id, **options)
            next(stream)
            self._grpc.cancel(request_id)
            return _read_to_the_end(stream)
        answer = self._helpers.submit(
            lambda: self._grpc.generate(prompt, request_id=request_id, **options)
        )
        while not self._grpc.cancel(request_id) and not answer.done():
            time.sleep(0.005)
        answer.result()
        return attempts.IMAGE

    def _counted(self) -> dict[str, float]:
        series = exposition.scrape(self._server.metrics_url)
        return exposition.by_label(series, "darkroom_requests_total", "outcome")

    def _settled(self, before: dict[str, float], sent: int) -> dict[str, float]:
        """What the server has counted since `before`, once all is: it counts after it answers."""
        give_up_at = time.monotonic() + SETTLE_TIMEOUT_S
        while True:
            now = self._counted()
            counted = {name: value - before.get(name, 0.0) for name, value in now.items()}
            if sum(counted.values()) >= sent or time.monotonic() > give_up_at:
                # One too many would come now.
                time.sleep(0.5)
                now = self._counted()
                return {name: value - before.get(name, 0.0) for name, value in now.items()}
            time.sleep(0.1)


class MemorySeries:
    """The memory of every process, by the number of requests that are done. Not thread-safe."""

    def __init__(self, names: dict[str, int], num_requests: int) -> None:
        self._processes = {**names, CoresUsed.CLIENT: os.getpid()}
        self._interval = max(1, num_requests // NUM_SAMPLES)
        self._done = 0
        self.series: dict[str, list[int]] = {"done": [], "dev_shm": []}
        for name in self._processes:
            self.series |= {f"{name}, pss": [], f"{name}, private": []}
        self._sample()

    def tick(self) -> None:
        """One more request is done."""
        self._done += 1
        if self._done % self._interval == 0:
            self._sample()

    def growth(self) -> dict[str, dict[str, float]]:
        return {
            name: growth(self.series["done"], sizes)
            for name, sizes in self.series.items()
            if name != "done"
        }

    def _sample(self) -> None:
        # A process that died meanwhile is told of by whoever looks at the server.
        with contextlib.suppress(OSError):
            taken = {name: processes.memory(it) for name, it in self._processes.items()}
            self.series["done"].append(self._done)
            # Darkroom's servers name their regions after the program that started them.
            self.series["dev_shm"].append(processes.shared_memory_kb(f"darkroom-{os.getpid()}-"))
            for name, sizes in taken.items():
                self.series[f"{name}, pss"].append(sizes.pss)
                self.series[f"{name}, private"].append(sizes.private)


def _read_to_the_end(stream: EventStream) -> str:
    """The outcome of a stream whose events come in order, the picture last."""
    events = list(stream)
    if not isinstance(events[0], Queued) or not isinstance(events[-1], Done):
        raise ServeError(f"a stream began with {events[0]} and ended with {events[-1]}")
    return attempts.IMAGE


def _raise_first_error(futures: list[Future[None]]) -> None:
    for future in futures:
        if future.done():
            future.result()


def _report(result: dict[str, Any]) -> str:
    outcomes = sorted({name for counts in result["outcomes"].values() for name in counts})
    kinds = [
        [kind, *(str(counts.get(name, "")) for name in outcomes)]
        for kind, counts in sorted(result["outcomes"].items())
    ]
    kinds.append(["all", *(str(result["seen"].get(name, "")) for name in outcomes)])
    counted = [f"{name} {number:.0f}" for name, number in sorted(result["counted"].items())]
    rows = [
        [
            name,
            f"{sizes['at_quarter'] / 1024:.1f}",
            f"{sizes['at_end'] / 1024:.1f}",
            f"{sizes['growth'] / 1024:+.2f}",
            f"{sizes['per_1000']:+.0f}",
        ]
        for name, sizes in result["memory_kb"].items()
        # Shares of common pages change with the number of processes; what leaks is private.
        if not name.endswith(", pss")
    ]
    verdict = "; ".join(result["disagreements"]) or "each request was answered once"
    header = ["memory of", "MB at 25 %", "at the end", "growth", "kB per 1000 requests"]
    return (
        f"{table(['clients saw', *outcomes], kinds)}\n\n"
        f"the server counted: {', '.join(counted)}\n"
        f"{verdict}; {result['requests_per_s']:.1f} requests/s\n\n{table(header, rows)}"
    )


if __name__ == "__main__":
    sys.exit(main())
