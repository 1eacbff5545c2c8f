"""Run NVIDIA's perf_analyzer against a server of one's own, over gRPC and over HTTP.

python benchmarks/perf.py [REPOSITORY] [--concurrency 1,4,8]
"""
# ruff: noqa: T201  a command prints

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from environment import RESULTS, ROOT, describe, write_result
from measurements import Answer, Round, table
from perf_analyzer import PerfAnalyzer, PerfAnalyzerError
from workload import make_requests, perf_analyzer_input

from darkroom import Client, DarkroomError
from darkroom.progress import terminal_progress
from darkroom.protocol import MODEL
from darkroom.server import Server, free_ports

STEPS = (4, 12)


def main() -> int:
    """Run the command; returns the exit status."""
    options = _parse()
    try:
        with terminal_progress("setting up perf_analyzer"):
            analyzer = PerfAnalyzer.install(ROOT / ".tools")
        with Server(options.repository, free_ports(), terminal_progress) as server:
            environment = describe(server)
            rounds = _measure(analyzer, server, options)
    except (DarkroomError, PerfAnalyzerError) as error:
        print(f"perf: {error}", file=sys.stderr)
        return 1
    print(_report(rounds))
    output = options.output or RESULTS / f"perf-{environment['model']['name']}.json"
    write_result(output, _result(rounds, environment, options))
    print(f"\nwritten: {output}")
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("repository", nargs="?", type=Path, default=ROOT / "build" / "shapes")
    parser.add_argument(
        "--concurrency", type=_numbers, default=[1, 4, 8], metavar="N,N,...", help="default: 1,4,8"
    )
    parser.add_argument(
        "--request-count",
        type=int,
        default=48,
        metavar="N",
        help="for each concurrency and protocol; default: %(default)s",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the workload")
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: in results/")
    return parser.parse_args()


def _numbers(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not whole numbers above 0, with commas")
    return [int(part) for part in parts]


def _measure(
    analyzer: PerfAnalyzer, server: Server, options: argparse.Namespace
) -> dict[tuple[str, int], Round]:
    """A round for each protocol and concurrency."""
    urls = {"grpc": server.grpc_url, "http": server.http_url.removeprefix("http://")}
    count = options.request_count
    workload = perf_analyzer_input(make_requests(count, seed=options.seed, steps=STEPS))
    with tempfile.TemporaryDirectory(prefix="darkroom-perf-") as scratch:
        workload_file = Path(scratch) / "workload.json"
        workload_file.write_text(json.dumps(workload))
        model = ["-m", MODEL, f"--input-data={workload_file}"]

        def profile(protocol: str, concurrency: int, *, is_quiet: bool = False) -> Round:
            # As many requests as the workload has: every round is the same work.
            load = [f"--concurrency-range={concurrency}", f"--request-count={count}"]
            arguments = [*model, "-i", protocol, "-u", urls[protocol], *load, "--percentile=95"]
            try:
                stamps = analyzer.profile(arguments, is_quiet=is_quiet)
            except PerfAnalyzerError as error:
                raise PerfAnalyzerError(f"{error}{_state_of(server)}") from error
            return Round([Answer(sent, answered, {}) for sent, answered in stamps])

        with terminal_progress("warming up"):
            # Every prompt once, so that no round pays for embeddings that another one finds.
            profile("grpc", max(options.concurrency), is_quiet=True)
        rounds = {}
        for protocol in urls:
            for concurrency in options.concurrency:
                print(f"\n=== perf_analyzer, {protocol}, concurrency {concurrency}", flush=True)
                rounds[protocol, concurrency] = profile(protocol, concurrency)
    return rounds


def _state_of(server: Server) -> str:
    """What a failure means for the server: empty if that goes on, else the end of its log."""
    with Client(server.grpc_url) as client:
        if client.is_ready():
            return ""
    lines = server.log.read_text(errors="replace").splitlines()
    return "\n".join(["\nThe server died; the end of its log:", *lines[-10:]])


def _report(rounds: dict[tuple[str, int], Round]) -> str:
    rows = []
    for (protocol, concurrency), measured in rounds.items():
        baseline = next(other for (name, _), other in rounds.items() if name == protocol)
        latency = measured.latency_ms()
        rows.append(
            [
                protocol,
                str(concurrency),
                str(len(measured.answers)),
                f"{measured.pictures_per_s:.2f}",
                f"{measured.pictures_per_s / baseline.pictures_per_s:.2f}",
                *(f"{latency[name]:.0f}" for name in ("p50", "p90", "p95", "p99")),
            ]
        )
    header = ["protocol", "concurrency", "requests", "pictures/s", "ratio"]
    header += ["p50 ms", "p90 ms", "p95 ms", "p99 ms"]
    return f"\n=== from perf_analyzer's time stamps\n\n{table(header, rows)}"


def _result(
    rounds: dict[tuple[str, int], Round], environment: dict[str, Any], options: argparse.Namespace
) -> dict[str, Any]:
    return {
        "benchmark": "perf",
        "environment": environment,
        "workload": {"requests": options.request_count, "seed": options.seed, "steps": STEPS},
        "rounds": [
            {
                "protocol": protocol,
                "concurrency": concurrency,
                **measured.result(),
            }
            for (protocol, concurrency), measured in rounds.items()
        ],
    }


if __name__ == "__main__":
    sys.exit(main())
