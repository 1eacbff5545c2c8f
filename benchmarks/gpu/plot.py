"""Draw what `benchmarks/gpu.sh` measured, which may be long ago and elsewhere.

python -m benchmarks.gpu.plot FILE FOLDER

It needs matplotlib, which nothing else here does: pip install matplotlib
"""
# ruff: noqa: T201  a command prints

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def main() -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("result", type=Path, metavar="FILE", help="a gpu.json")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="for the pictures")
    options = parser.parse_args()
    try:
        import matplotlib as mpl  # noqa: PLC0415  nothing else needs it
    except ModuleNotFoundError:
        print("plot: this needs matplotlib: pip install matplotlib", file=sys.stderr)
        return 1
    mpl.use("Agg")
    result = json.loads(options.result.read_text())
    options.folder.mkdir(parents=True, exist_ok=True)
    for name, parts in result["models"].items():
        for what, draw in (("steps", _steps), ("load", _load), ("latency", _latency)):
            path = options.folder / f"{name}-{what}.png"
            if draw(name, parts, path):
                print(path)
    return 0


def _steps(name: str, parts: Mapping[str, Any], path: Path) -> bool:
    """Time of a step by rows: of the network, and of the engine."""
    if "network" not in parts and "steps" not in parts:
        return False
    figure, axes = _figure(f"{name}: a step by rows", "rows", "ms")
    for configuration, of in parts.get("network", {}).get("configurations", {}).items():
        rows = [entry["rows"] for entry in of["denoiser"]]
        axes.plot(
            rows,
            [entry["ms"]["median"] for entry in of["denoiser"]],
            marker="o",
            label=f"the denoiser alone, {configuration}",
        )
    if "steps" in parts:
        entries = parts["steps"]["engine"]
        axes.plot(
            [entry["rows"] for entry in entries],
            [entry["ms"]["median"] for entry in entries],
            marker="x",
            linestyle="--",
            label="a step of the engine",
        )
    return _save(figure, axes, path)


def _load(name: str, parts: Mapping[str, Any], path: Path) -> bool:
    """Latency by load, of each policy."""
    loads = parts.get("load", {}).get("loads")
    if not loads:
        return False
    figure, axes = _figure(f"{name}: latency by load", "share of the capacity", "s")
    for policy in loads[0]["policies"]:
        shares = [load["share"] for load in loads if policy in load["policies"]]
        for rank, style in (("p50", "-"), ("p95", "--")):
            seconds = [load["policies"][policy]["latency_s"][rank] for load in loads]
            axes.plot(shares, seconds, linestyle=style, marker="o", label=f"{policy}, {rank}")
    axes.set_yscale("log")
    return _save(figure, axes, path)


def _latency(name: str, parts: Mapping[str, Any], path: Path) -> bool:
    """Which share of the requests was answered within how long, at the highest load."""
    loads = parts.get("load", {}).get("loads")
    if not loads:
        return False
    highest = loads[-1]
    figure, axes = _figure(
        f"{name}: latencies at {highest['share']:g} of the capacity", "s", "share of the requests"
    )
    for policy, of in highest["policies"].items():
        # Without those that were given up, the curve ends below 1.
        seconds = sorted(visit[1] - visit[0] for visit in of["visits"] if visit[1] is not None)
        shares = [(n + 1) / len(of["visits"]) for n in range(len(seconds))]
        axes.step(seconds, shares, where="post", label=policy)
    return _save(figure, axes, path)


def _figure(title: str, x: str, y: str) -> tuple[Any, Any]:
    from matplotlib import pyplot as plt  # noqa: PLC0415  nothing else needs it

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    return figure, axes


def _save(figure: Any, axes: Any, path: Path) -> bool:
    axes.legend()
    figure.savefig(path, dpi=150)
    return True


if __name__ == "__main__":
    sys.exit(main())
