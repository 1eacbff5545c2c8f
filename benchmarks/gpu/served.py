"""The networks in the engine's process against a process of their own, in a real tritonserver."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.environment import ROOT
from benchmarks.gpu.bench import Bench

SERVER_SITE = ROOT / "build" / "gpu" / "server-site"
"""Packages for the server alone: its Python backend wants a numpy before 2."""
NUM_STEPS = 30
STOP_S = 20.0


def hop(bench: Bench) -> dict[str, Any]:
    """What `benchmarks/hop.py` measures on this repository.

    Raises:
        RuntimeError: it failed, or did not end in the time that is left.
    """
    environment = _environment()
    if not _has_server(environment):
        bench.session.note("server: nvidia-pytriton is not installed, nothing is measured")
        return {"skipped": "nvidia-pytriton is not installed"}
    # The servers take the memory that the engine has here.
    bench.close()
    with tempfile.TemporaryDirectory(prefix="darkroom-bench-") as scratch:
        output = Path(scratch) / "hop.json"
        command = [sys.executable, str(ROOT / "benchmarks" / "hop.py")]
        command += [str(bench.model.repository), "--output", str(output)]
        command += ["--repeats", str(bench.scale.num_pairs)]
        command += ["--steps", str(min(NUM_STEPS, bench.scale.mixed_steps[1]))]
        status = _run(command, environment, bench.session.left_s)
        if status is None:
            raise RuntimeError("benchmarks/hop.py did not end in the time that was left")
        if status != 0:
            raise RuntimeError(f"benchmarks/hop.py failed with status {status}, see its output")
        result = json.loads(output.read_text())
    kept = ("steps", "size", "ways")
    return {
        **{name: result[name] for name in kept},
        "engine": result["environment"]["engine"],
        "versions": result["environment"]["versions"],
    }


def _environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(SERVER_SITE), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path}


def _has_server(environment: dict[str, str]) -> bool:
    if importlib.util.find_spec("pytriton") is not None:
        return True
    find = "import importlib.util, sys; sys.exit(importlib.util.find_spec('pytriton') is None)"
    command = [sys.executable, "-c", find]
    return subprocess.run(command, check=False, env=environment).returncode == 0  # noqa: S603


def _run(command: list[str], environment: dict[str, str], timeout_s: float) -> int | None:
    """The exit status; None if it had to be ended."""
    process = subprocess.Popen(command, env=environment)  # noqa: S603  our own command line
    try:
        return process.wait(max(1.0, timeout_s))
    except subprocess.TimeoutExpired:
        # As by Ctrl-C: it stops its servers.
        process.send_signal(signal.SIGINT)
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        return None
