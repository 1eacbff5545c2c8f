"""Measure the GPU path on the machine at hand, next to diffusers with the same weights.

benchmarks/gpu.sh [--models sd15,sdxl] [--parts PART,...] [--small] [--out FOLDER]
"""
# ruff: noqa: T201  a command prints

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks.command import positive
from benchmarks.environment import ROOT, describe_machine, describe_model
from benchmarks.gpu import accuracy, card, models, report, served, speed, under_load
from benchmarks.gpu.bench import POLICIES, Bench, Choices
from benchmarks.gpu.clock import Clock
from benchmarks.gpu.networks import CONFIGURATIONS
from benchmarks.gpu.scale import FULL, SMALL, Scale
from benchmarks.gpu.session import Session

PARTS: dict[str, tuple[Callable[[Bench], dict[str, Any]], float]] = {
    "network": (speed.network, 40.0),
    "check": (accuracy.check, 60.0),
    "steps": (speed.steps, 30.0),
    "solo": (speed.solo, 40.0),
    "saturated": (speed.saturated, 60.0),
    "exact": (accuracy.exact, 30.0),
    "join": (speed.join, 20.0),
    "load": (under_load.load, 90.0),
    "compiled": (speed.compiled, 150.0),
    "server": (served.hop, 90.0),
}
"""In the order in which they run, with the seconds that must be left for one to begin."""
PREPARATION_S = 60.0
SMALL_SHARE = 0.1
"""Of those seconds, for small models."""
PACKAGES = (
    *("torch", "triton", "diffusers", "transformers", "accelerate", "numpy", "pillow"),
    *("tritonclient", "nvidia-pytriton", "onnxruntime"),
)


@dataclass(frozen=True)
class Run:
    """What is to be measured, and how."""

    scale: Scale
    device: str
    precision: str
    work: Path
    parts: tuple[str, ...]
    choices: Choices
    share: float
    """Of the seconds that a part needs at full size."""


def main() -> int:
    """Run the command; returns the exit status."""
    options = parse()
    # Requests that are given up at the end of a part would be told one by one.
    logging.getLogger("darkroom_engine").setLevel(logging.ERROR)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    run = Run(
        scale=SMALL if options.small else FULL,
        device=device,
        precision=options.precision or ("fp32" if device == "cpu" else "fp16"),
        work=options.work,
        parts=options.parts,
        choices=Choices(options.configurations, options.policies, options.shares),
        share=SMALL_SHARE if options.small else 1.0,
    )
    path = options.out / "gpu.json"
    result = {
        "benchmark": "gpu",
        "environment": {**describe_machine(_installed(PACKAGES)), "gpu": card.describe()},
        "is_small": options.small,
        "device": run.device,
        "precision": run.precision,
        "models": {},
    }
    session = Session(path, result, options.budget)
    if "card" in run.parts:
        dtype = models.DTYPES[run.precision]
        session.run("card", 0.0, partial(card.measure, Clock(device), run.scale, dtype), result)
    for name in options.models:
        store = result["models"][name] = {}
        _measure(name, run, session, store)
    session.close()
    print(report.text(result))
    print(f"\nwritten: {path}")
    return 1 if session.num_failed else 0


def _measure(name: str, run: Run, session: Session, store: dict[str, Any]) -> None:
    wanted = {part: entry for part, entry in PARTS.items() if part in run.parts}
    if not wanted:
        return
    made: list[Bench] = []

    def prepare() -> dict[str, Any]:
        model = models.prepare(
            name,
            run.scale.checkpoints[name],
            run.work,
            precision=run.precision,
            device=run.device,
        )
        made.append(Bench(model, run.scale, session, run.choices))
        described = describe_model(models.read_manifest(model))
        return {**described, "seconds": model.prepared_s, **made[0].operations.record()}

    session.run(f"{name}/prepared", run.share * PREPARATION_S, prepare, store)
    for bench in made:
        store["engine"] = bench.started
        try:
            for part, (measure, needed_s) in wanted.items():
                session.run(f"{name}/{part}", run.share * needed_s, partial(measure, bench), store)
        finally:
            bench.close()


def _installed(packages: tuple[str, ...]) -> list[str]:
    found = []
    for package in packages:
        try:
            metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
        found.append(package)
    return found


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="benchmarks/gpu.sh", description=(__doc__ or "").splitlines()[0]
    )
    every = ("card", *PARTS)
    default = ("card", *(part for part in PARTS if part != "server"))
    parser.add_argument("--models", type=_some_of(FULL.checkpoints), default=("sd15",))
    parser.add_argument(
        "--parts", type=_some_of(every), default=default, help=f"of {', '.join(every)}"
    )
    parser.add_argument(
        "--configurations",
        type=_some_of(CONFIGURATIONS),
        default=("graphs", "eager"),
        help=f"of our networks, the engine's first: of {', '.join(CONFIGURATIONS)}",
    )
    parser.add_argument("--policies", type=_some_of(POLICIES), default=POLICIES)
    parser.add_argument("--shares", type=_shares, help="loads, as in 0.5,0.75,0.9")
    parser.add_argument("--small", action="store_true", help="small models, on any machine")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: a GPU if there is one")
    parser.add_argument("--precision", choices=[*models.DTYPES], help="default: fp16 on a GPU")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu-results")
    parser.add_argument(
        "--work", type=Path, default=ROOT / "build" / "gpu", help="for checkpoints and exports"
    )
    parser.add_argument("--budget", type=positive, default=540, metavar="SECONDS")
    return parser.parse_args(arguments)


def _some_of(known: Any) -> Callable[[str], tuple[str, ...]]:
    def parse(text: str) -> tuple[str, ...]:
        chosen = tuple(text.split(","))
        unknown = [name for name in chosen if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(
                f"{unknown[0]!r} does not exist, there are {', '.join(known)}"
            )
        return chosen

    return parse


def _shares(text: str) -> tuple[float, ...]:
    try:
        shares = tuple(float(share) for share in text.split(","))
    except ValueError:
        shares = ()
    if not shares or not all(0 < share <= 2 for share in shares):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of shares above 0 and up to 2")
    return shares


if __name__ == "__main__":
    sys.exit(main())
