"""The checkpoints that are measured, and what is exported of them."""

import contextlib
import json
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import ROOT
from darkroom_engine import Manifest
from darkroom_export.random_checkpoint import make_random_checkpoint

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Model:
    """A checkpoint, and the repository of PyTorch programs that was exported of it."""

    name: str
    checkpoint: Path
    repository: Path
    precision: str
    device: str
    prepared_s: dict[str, float] = field(default_factory=dict)
    """What making it took, of what was not there yet."""

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.precision]

    def manifest(self) -> Manifest:
        """What was exported."""
        return Manifest.load(self.repository / "manifest.json")


def prepare(name: str, source: str, folder: Path, *, precision: str, device: str) -> Model:
    """Make the checkpoint and export it, unless an earlier run has.

    Args:
        source: an architecture to be made with random weights, or a checkpoint of the checkout.

    Raises:
        subprocess.CalledProcessError: the export failed, and has said why.
    """
    given = ROOT / source
    is_given = (given / "model_index.json").is_file()
    checkpoint = given if is_given else folder / f"{source}-checkpoint"
    model = Model(
        name, checkpoint, folder / f"{Path(source).parts[0]}-{precision}", precision, device
    )
    if not (checkpoint / "model_index.json").is_file():
        start = time.perf_counter()
        # A GPU draws billions of random numbers in the time that a CPU takes for millions.
        with _created_on(device):
            make_random_checkpoint(source, checkpoint)
        model.prepared_s["random_weights"] = round(time.perf_counter() - start, 1)
        if device != "cpu":
            torch.cuda.empty_cache()
    start = time.perf_counter()
    command = [sys.executable, "-m", "darkroom.cli", "export", str(checkpoint)]
    command += [str(model.repository), "--backend", "torch"]
    command += ["--precision", precision, "--device", device]
    subprocess.run(command, check=True)  # noqa: S603  our own command line
    model.prepared_s["export"] = round(time.perf_counter() - start, 1)
    return model


def read_manifest(model: Model) -> dict[str, Any]:
    """The manifest as it is written."""
    manifest: dict[str, Any] = json.loads((model.repository / "manifest.json").read_text())
    return manifest


def _created_on(device: str) -> contextlib.AbstractContextManager[object]:
    return contextlib.nullcontext() if device == "cpu" else torch.device(device)
