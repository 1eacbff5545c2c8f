"""Measure what LoRA inputs cost a denoiser's call, by how many rank components it carries.

python benchmarks/lora.py REPOSITORY ADAPTABLE

The two are repositories of one checkpoint; the second was exported with LoRA inputs. No server
runs: the graphs are called as a network's process calls them.
"""
# ruff: noqa: T201  a command prints

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from command import command_parser, positive
from environment import RESULTS, describe_machine, describe_model, write_result
from measurements import table

from darkroom.progress import terminal_progress

RANKS = (1, 8, 16, 32, 64)
"""The first is the call in which no row uses an adapter."""
NUM_TOKENS = 77
DOWN, UP = ".lora_down", ".lora_up"


def main() -> int:
    """Run the command; returns the exit status."""
    options = _parse()
    try:
        networks = {
            "plain": Denoiser(options.repository, options),
            "adaptable": Denoiser(options.adaptable, options),
        }
        if not networks["adaptable"].widths:
            raise ValueError(f"{options.adaptable}: was exported without LoRA inputs")
        environment = _describe(networks["plain"], options)
        rounds = _measure(networks, options)
    except (ValueError, KeyError, OSError) as error:
        print(f"lora: {error}", file=sys.stderr)
        return 1
    result = _result(rounds, networks["adaptable"], environment, options)
    print(f"\n{_report(result)}")
    output = options.output or RESULTS / f"lora-{environment['model']['name']}.json"
    write_result(output, result)
    print(f"\nwritten: {output}")
    return 0


class Denoiser:
    """A repository's denoiser, and random inputs for it."""

    def __init__(self, repository: Path, options: argparse.Namespace) -> None:
        """Load the graph; ValueError if there is none."""
        path = repository / "manifest.json"
        if not path.is_file():
            raise ValueError(f"{path} is missing")
        self.manifest: dict[str, Any] = json.loads(path.read_text())
        network = self.manifest["denoiser"]["network"]
        session_options = onnxruntime.SessionOptions()
        session_options.intra_op_num_threads = options.threads
        session_options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        session_options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(
            str(repository / network / "1" / "model.onnx"),
            sess_options=session_options,
            providers=["CPUExecutionProvider"],
        )
        shapes = {entry.name: entry.shape for entry in self._session.get_inputs()}
        self.widths = {
            name.removesuffix(DOWN): (shape[1], shapes[name.removesuffix(DOWN) + UP][0])
            for name, shape in shapes.items()
            if name.endswith(DOWN)
        }
        self._rng = np.random.default_rng(options.seed)
        self._feed = self._conditions(shapes, options)

    def run(self, lora: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Call it once; returns how long that took, and for how long it kept cores busy."""
        feed = {**self._feed, **lora}
        wall, cpu = time.perf_counter(), time.process_time()
        self._session.run([self.manifest["denoiser"]["output"]], feed)
        return {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}

    def lora(self, rank: int, rows: int) -> dict[str, np.ndarray]:
        """Adapters of so many rank components together, of which each row takes its share."""
        shares = self._rng.random((rows, rank), np.float32)
        feed = {"lora_scale": np.zeros_like(shares) if rank == RANKS[0] else shares}
        for layer, (width_in, width_out) in self.widths.items():
            feed[layer + DOWN] = 0.01 * self._normal(rank, width_in)
            feed[layer + UP] = 0.01 * self._normal(width_out, rank)
        return feed

    def bytes_per_call(self, rank: int) -> int:
        """What a call would carry if the weights came with it."""
        return 4 * rank * sum(map(sum, self.widths.values()))

    def _conditions(
        self, shapes: Mapping[str, list[Any]], options: argparse.Namespace
    ) -> dict[str, np.ndarray]:
        size = options.size // self.manifest["latents"]["vae_scale_factor"]
        feed = {}
        for name, shape in shapes.items():
            if name == "lora_scale" or name.endswith((DOWN, UP)):
                continue
            if name == self.manifest["denoiser"]["sample"]:
                rest = [shape[1], size, size]
            elif name == "encoder_hidden_states":
                rest = [NUM_TOKENS, shape[2]]
            else:
                rest = [width if isinstance(width, int) else size for width in shape[1:]]
            feed[name] = self._normal(options.rows, *rest)
        feed["timestep"] = np.linspace(10, 900, options.rows, dtype=np.float32)
        return feed

    def _normal(self, *size: int) -> np.ndarray:
        return self._rng.standard_normal(size, np.float32)


Round = dict[str, dict[str, float]]
"""The times of a call of each kind, made one after the other."""


def _measure(networks: Mapping[str, Denoiser], options: argparse.Namespace) -> list[Round]:
    adaptable = networks["adaptable"]
    loras = {f"rank {rank}": adaptable.lora(rank, options.rows) for rank in RANKS}
    rounds: list[Round] = []
    # The first round warms up.
    for number in range(options.repeats + 1):
        with terminal_progress(f"round {number} of {options.repeats}"):
            measured = {"plain": networks["plain"].run({})}
            measured |= {name: adaptable.run(lora) for name, lora in loras.items()}
        rounds.append(measured)
    return rounds[1:]


def _result(
    rounds: Sequence[Round],
    adaptable: Denoiser,
    environment: dict[str, Any],
    options: argparse.Namespace,
) -> dict[str, Any]:
    kinds = {}
    for kind in rounds[0]:
        kinds[kind] = {
            f"{clock}_ratio": round(
                statistics.median(one[kind][clock] / one["plain"][clock] for one in rounds), 3
            )
            for clock in ("cpu_s", "wall_s")
        }
        kinds[kind]["cpu_s"] = round(statistics.median(one[kind]["cpu_s"] for one in rounds), 3)
        kinds[kind]["least_cpu_s"] = round(min(one[kind]["cpu_s"] for one in rounds), 3)
    return {
        "benchmark": "lora",
        "environment": environment,
        "load_average_at_the_end": [round(load, 2) for load in os.getloadavg()],
        "rows": options.rows,
        "size": options.size,
        "threads": options.threads,
        "layers": len(adaptable.widths),
        "weight_bytes_per_call": {f"rank {rank}": adaptable.bytes_per_call(rank) for rank in RANKS},
        "calls": kinds,
        "rounds": [
            {
                kind: {clock: round(s, 4) for clock, s in times.items()}
                for kind, times in one.items()
            }
            for one in rounds
        ],
    }


def _report(result: Mapping[str, Any]) -> str:
    plain = result["calls"]["plain"]
    rows = []
    for kind, numbers in result["calls"].items():
        size = result["weight_bytes_per_call"].get(kind, 0)
        rows.append(
            [
                kind,
                f"{numbers['cpu_s']:.2f}",
                f"{numbers['cpu_s_ratio']:.3f}",
                f"{numbers['least_cpu_s'] / plain['least_cpu_s']:.3f}",
                f"{numbers['wall_s_ratio']:.3f}",
                f"{size / 1e6:.1f}",
            ]
        )
    header = ["call", "CPU s", "ratio", "ratio of least", "wall ratio", "MB if sent"]
    return f"""{result["rows"]} rows of {result["size"]} pixels, {result["layers"]} layers that \
adapters change, medians of {len(result["rounds"])} rounds
CPU s: how long cores were busy with the call, which other programs disturb less than its wall time
ratio: over the plain graph's call of the same round; MB if sent: weights of that rank

{table(header, rows)}"""


def _describe(plain: Denoiser, options: argparse.Namespace) -> dict[str, Any]:
    return {
        **describe_machine(("darkroom", "onnxruntime", "numpy")),
        **describe_model(plain.manifest),
        "adaptable": options.adaptable.name,
    }


def _parse() -> argparse.Namespace:
    parser = command_parser(__doc__)
    parser.add_argument("adaptable", type=Path, help="the same, exported with LoRA inputs")
    parser.add_argument("--rows", type=positive, default=2, help="of a call")
    parser.add_argument("--size", type=positive, default=256, help="of a picture, in pixels")
    parser.add_argument("--repeats", type=positive, default=5, help="rounds")
    parser.add_argument(
        "--threads", type=positive, default=len(os.sched_getaffinity(0)), help="of the graph"
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
