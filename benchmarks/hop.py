"""Measure what the way to the networks costs a step: in the engine's process, or by Triton's BLS.

python benchmarks/hop.py [REPOSITORY]
"""
# ruff: noqa: T201  a command prints

import argparse
import contextlib
import statistics
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from command import command_parser, positive
from environment import RESULTS, ROOT, describe, write_result
from measurements import table
from serving import REQUEST_TIMEOUT_S, serving

from darkroom import Client, DarkroomError
from darkroom.progress import terminal_progress

PROMPT = "a large red circle on a blue background"
ROWS = (1, 2, 4, 8)
"""Those of a step; with two or more, half of them are of guidance."""
GUIDANCE_SCALE = 5.0
BASELINE = "in process"


@dataclass(frozen=True)
class Way:
    """A way to the networks."""

    name: str
    is_onnx: bool = False
    settings: Mapping[str, str] = field(default_factory=dict)
    """Of the engine."""


WAYS = (
    Way(BASELINE, settings={"in_process": "1"}),
    Way("by BLS", settings={"in_process": "0"}),
    Way("ONNX Runtime, by BLS", is_onnx=True),
)

Measured = dict[str, dict[int, list[float]]]
"""Milliseconds of a step, one number a round, by the way's name and the number of rows."""


def main() -> int:
    """Run the command; returns the exit status."""
    options = _parse()
    ways = [way for way in WAYS if options.onnx or not way.is_onnx]
    try:
        with contextlib.ExitStack() as stack:
            # All at once: what is idle takes no time, and the rounds of all can be side by side.
            servers = {
                way.name: stack.enter_context(
                    serving(options.onnx if way.is_onnx else options.repository, way.settings)
                )
                for way in ways
            }
            environment = describe(servers[BASELINE])
            environment["versions"]["torch"] = metadata.version("torch")
            clients = {
                name: stack.enter_context(Client(server.grpc_url, timeout=REQUEST_TIMEOUT_S))
                for name, server in servers.items()
            }
            measured = _measure(clients, options)
    except (DarkroomError, OSError, metadata.PackageNotFoundError) as error:
        print(f"hop: {error}", file=sys.stderr)
        return 1
    results = {name: _result(measured, name) for name in servers}
    print(f"\n{_report(results)}")
    output = options.output or RESULTS / f"hop-{environment['model']['name']}.json"
    result = {
        "benchmark": "hop",
        "environment": environment,
        "seed": options.seed,
        "steps": options.steps,
        "size": options.size,
        "ways": results,
    }
    write_result(output, result)
    print(f"\nwritten: {output}")
    return 0


def _parse() -> argparse.Namespace:
    parser = command_parser(__doc__)
    parser.set_defaults(repository=ROOT / "build" / "shapes-torch")
    parser.add_argument(
        "--onnx", type=Path, metavar="REPOSITORY", help="the same checkpoint, to compare with"
    )
    parser.add_argument(
        "--repeats", type=positive, default=5, metavar="N", help="default: %(default)s"
    )
    parser.add_argument(
        "--steps", type=positive, default=30, metavar="N", help="of each; default: %(default)s"
    )
    parser.add_argument("--size", type=positive, metavar="N", help="default: the checkpoint's")
    return parser.parse_args()


def _measure(clients: Mapping[str, Client], options: argparse.Namespace) -> Measured:
    measured: Measured = {name: {rows: [] for rows in ROWS} for name in clients}
    with terminal_progress("warming up"):
        for client in clients.values():
            for rows in ROWS:
                _step_ms(client, rows, options)
    for repeat in range(1, options.repeats + 1):
        with terminal_progress(f"round {repeat} of {options.repeats}"):
            for rows in ROWS:
                for name, client in clients.items():
                    measured[name][rows].append(_step_ms(client, rows, options))
    return measured


def _step_ms(client: Client, rows: int, options: argparse.Namespace) -> float:
    """A step's time at a mean, by the server's own account of one request."""
    is_guided = rows > 1
    size = {"width": options.size, "height": options.size} if options.size else {}
    pictures = client.generate(
        PROMPT,
        num_images_per_prompt=rows // 2 if is_guided else 1,
        guidance_scale=GUIDANCE_SCALE if is_guided else 1.0,
        num_inference_steps=options.steps,
        seed=options.seed,
        **size,
    )
    return pictures[0].timings["denoise_ms"] / options.steps


def _result(measured: Measured, name: str) -> dict[str, Any]:
    """Of one way, by rows; ratios and differences are of neighbouring calls."""
    result = {}
    for rows, times in measured[name].items():
        pairs = list(zip(times, measured[BASELINE][rows], strict=True))
        result[str(rows)] = {
            "step_ms": round(statistics.median(times), 3),
            "ratio": round(statistics.median(time / baseline for time, baseline in pairs), 3),
            "more_ms": round(statistics.median(time - baseline for time, baseline in pairs), 3),
            "step_ms_of_rounds": [round(time, 3) for time in times],
        }
    return result


def _report(results: Mapping[str, dict[str, Any]]) -> str:
    rows = [
        [
            f"{name}, {number} rows",
            f"{entry['step_ms']:.2f}",
            f"{entry['ratio']:.3f}",
            f"{entry['more_ms']:+.2f}",
        ]
        for number in map(str, ROWS)
        for name, entry in ((name, result[number]) for name, result in results.items())
    ]
    return table(["networks", "step ms", "ratio", "more ms"], rows)


if __name__ == "__main__":
    sys.exit(main())
