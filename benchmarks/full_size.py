"""Take a full-size architecture with random weights all the way to a served picture, once.

python benchmarks/full_size.py sd15 FOLDER [--precision fp16] [--profile low]
"""
# ruff: noqa: T201  a command prints

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from command import positive
from environment import RESULTS, describe, write_result
from measurements import table
from memory import PROFILES, REQUEST_TIMEOUT_S, Meter

from darkroom import Client, DarkroomError
from darkroom.progress import terminal_progress
from darkroom.server import Server, free_ports

PROMPT = "a photograph of an astronaut riding a horse"
START_TIMEOUT_S = 3600.0


def main() -> int:
    """Run the command; returns the exit status."""
    options = _parse()
    checkpoint = options.folder / f"{options.architecture}-checkpoint"
    repository = options.folder / f"{options.architecture}-{options.precision}"
    try:
        made = _run("random-checkpoint", options.architecture, str(checkpoint))
        precision = ("--precision", options.precision)
        exported = _run("export", str(checkpoint), str(repository), *precision)
        shutil.rmtree(checkpoint)
        served = _serve(repository, options)
    except (DarkroomError, OSError, subprocess.CalledProcessError) as error:
        print(f"full_size: {error}", file=sys.stderr)
        return 1
    environment, stages = served
    stages = {"random weights": made, "export": exported, **stages}
    rows = [(name, f"{it['seconds']:.1f}", f"{it['peak_mb']:.0f}") for name, it in stages.items()]
    print(f"\n{table(('stage', 'seconds', 'peak MB'), rows)}")
    output = options.output or RESULTS / f"full-size-{repository.name}.json"
    setting = ("architecture", "precision", "profile", "size", "steps")
    write_result(
        output,
        {
            "benchmark": "full_size",
            "environment": environment,
            **{name: getattr(options, name) for name in setting},
            "errors": _errors(repository),
            "stages": stages,
        },
    )
    print(f"\nwritten: {output}")
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("architecture", help="sd15, sd21 or sdxl")
    parser.add_argument("folder", type=Path, help="for the checkpoint and the repository")
    parser.add_argument("--precision", choices=["fp32", "fp16"], default="fp32")
    parser.add_argument("--profile", choices=PROFILES, default="full")
    parser.add_argument("--size", type=positive, default=512, help="default: %(default)s")
    parser.add_argument("--steps", type=positive, default=4, help="default: %(default)s")
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: in results/")
    return parser.parse_args()


def _run(*arguments: str) -> dict[str, float]:
    """A darkroom command in a process of its own: its time, and the most memory it held."""
    start = time.monotonic()
    subprocess.run([sys.executable, "-m", "darkroom.cli", *arguments], check=True)  # noqa: S603
    seconds = time.monotonic() - start
    # Of the largest child so far, which is the later one: an export takes more than its weights.
    peak_kb = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return {"seconds": round(seconds, 1), "peak_mb": round(peak_kb / 1024, 1)}


def _errors(repository: Path) -> dict[str, float]:
    """How far each exported network was from PyTorch in float32, of its output's range."""
    networks = json.loads((repository / "manifest.json").read_text())["networks"]
    return {name: record["verification"]["error"] for name, record in networks.items()}


def _serve(
    repository: Path, options: argparse.Namespace
) -> tuple[dict[str, Any], dict[str, dict[str, float]]]:
    server = Server(
        repository,
        free_ports(),
        engine_parameters={"memory_profile": options.profile},
        start_timeout_s=START_TIMEOUT_S,
    )
    stages = {}
    try:
        with terminal_progress("starting the server"), Meter(server) as meter:
            server.start()
        stages["start"] = meter.phase()
        with (
            Client(server.grpc_url, timeout=REQUEST_TIMEOUT_S) as client,
            terminal_progress("making a picture"),
            Meter(server) as meter,
        ):
            picture = client.generate(
                PROMPT,
                seed=0,
                num_inference_steps=options.steps,
                width=options.size,
                height=options.size,
            )
        stages["picture"] = meter.phase()
        picture.save(options.folder / f"{options.architecture}.png")
        print(f"timings: {picture.timings}")
        results = {
            name: {"seconds": round(it.seconds, 1), "peak_mb": round(it.peak_mb, 1)}
            for name, it in stages.items()
        }
        results["picture"] |= {name: float(ms) for name, ms in picture.timings.items()}
        return describe(server), results
    finally:
        server.stop()


if __name__ == "__main__":
    sys.exit(main())
