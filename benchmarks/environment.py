"""Where a benchmark ran: what its numbers depend on besides the code."""

import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import tritonclient.grpc

from darkroom.protocol import MODEL
from darkroom.server import Server

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
_PACKAGES = ("darkroom", "nvidia-pytriton", "tritonclient", "onnxruntime", "numpy")


def describe(server: Server) -> dict[str, Any]:
    """The machine, the versions, the model and the engine's settings, for a result file."""
    manifest = json.loads((server.repository / "manifest.json").read_text())
    with tritonclient.grpc.InferenceServerClient(server.grpc_url) as triton:
        server_version = triton.get_server_metadata(as_json=True)["version"]
        config = triton.get_model_config(MODEL, as_json=True)["config"]
    return {
        **describe_machine(_PACKAGES, tritonserver=server_version),
        **describe_model(manifest),
        "picture": {key: manifest["limits"][f"default_{key}"] for key in ("width", "height")},
        "engine": {
            key: entry["string_value"] for key, entry in sorted(config["parameters"].items())
        },
    }


def describe_machine(packages: Iterable[str], **versions: str) -> dict[str, Any]:
    """The machine and the versions, of these packages and of what else there is."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": git_commit(ROOT),
        "cpu": cpu_model(Path("/proc/cpuinfo")),
        "cores": len(os.sched_getaffinity(0)),
        "gpus": gpus(),
        # Other work on the machine spoils the numbers; this tells.
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {
            "python": platform.python_version(),
            **versions,
            **{package: metadata.version(package) for package in packages},
        },
    }


def describe_model(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What was exported, and from what."""
    return {
        "model": {key: manifest[key] for key in ("name", "family", "precision", "backend")},
        "checkpoint": manifest["checkpoint"]["sha256"],
    }


def cpu_model(cpuinfo: Path) -> str:
    """The name of the processor, or its architecture where the system does not tell."""
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.machine()


def gpus() -> list[str]:
    """Name and driver of each NVIDIA GPU."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    command = [program, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    result = subprocess.run(  # noqa: S603  our own command line
        command, check=False, capture_output=True, text=True
    )
    return result.stdout.splitlines() if result.returncode == 0 else []


def git_commit(directory: Path) -> str | None:
    """The commit of a checkout, with "+" behind it if files were changed; None outside of one."""
    try:
        commit = _git(directory, "rev-parse", "HEAD")
        is_changed = _git(directory, "status", "--porcelain")
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit}+" if is_changed else commit


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Write JSON, with each list of mere values on one line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=1)
    # Line ends within texts are escaped: those that are found are JSON's own.
    text = re.sub(r"\[\n[^][{}]*\n *\]", _on_one_line, text)
    path.write_text(text + "\n")


def _on_one_line(values: re.Match[str]) -> str:
    return "[" + re.sub(r"\n *", " ", values[0][1:-1]).strip() + "]"


def _git(directory: Path, *arguments: str) -> str:
    command = ["git", "-C", str(directory), *arguments]
    return subprocess.run(  # noqa: S603  our own command line
        command, check=True, capture_output=True, text=True
    ).stdout.strip()
