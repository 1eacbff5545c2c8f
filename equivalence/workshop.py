"""Makes what is compared: small checkpoints of every family, LoRAs for them, and repositories."""

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path

import diffusers
import torch
from safetensors.torch import save_file

from darkroom.progress import Progress, silent_progress
from darkroom_export import export_checkpoint
from darkroom_export.random_checkpoint import make_random_checkpoint
from equivalence.cases import CASES

LORA_RANK = 4
LORA_STRENGTH = 0.3
"""Of the random weights: enough to make other pictures."""
LORAS = {"ink": 1, "pixelart": 2, "watercolor": 3}
"""Each with its seed; the last is fused at the export."""
FUSED = "watercolor"
WITH_LORAS = "tiny-sd15"
WITH_SAFETY_CHECKER = "tiny-sd15-safety"


class Workshop:
    """A folder of checkpoints and repositories; what is there is not made again.

    Several processes may use one folder: they take turns.
    """

    def __init__(self, folder: Path, progress: Progress = silent_progress) -> None:
        self._folder = folder
        self._progress = progress

    def checkpoint(self, architecture: str) -> Path:
        with self._locked():
            return self._checkpoint(architecture)

    def repository(self, architecture: str) -> Path:
        """The export of a checkpoint, with all that its cases need."""
        with self._locked():
            return self._repository(architecture)

    def reference_folders(self) -> tuple[dict[str, Path], dict[str, Path]]:
        """All checkpoints and LoRAs by name, for the pipelines."""
        architectures = {case.architecture for case in CASES}
        architectures |= {case.refiner for case in CASES if case.refiner}
        architectures |= {control.architecture for case in CASES for control in case.controls}
        with self._locked():
            checkpoints = {name: self._checkpoint(name) for name in sorted(architectures)}
            return checkpoints, {name: self._lora(name) for name in LORAS}

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _checkpoint(self, architecture: str) -> Path:
        folder = self._folder / "checkpoints" / architecture
        if not folder.is_dir():
            with self._progress(f"making {architecture}"):
                partial = folder.with_name(f".{architecture}")
                make_random_checkpoint(architecture, partial)
                partial.rename(folder)
        return folder

    def _lora(self, name: str) -> Path:
        """A LoRA for the attention layers of the small Stable Diffusion 1.5."""
        path = self._folder / "loras" / f"{name}.safetensors"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            unet = diffusers.UNet2DConditionModel.from_pretrained(
                self._checkpoint(WITH_LORAS), subfolder="unet"
            )
            save_file(_random_lora(unet, LORAS[name]), path)
        return path

    def _repository(self, architecture: str) -> Path:
        folder = self._folder / "repositories" / architecture
        controls = {
            control.name: str(self._checkpoint(control.architecture))
            for case in CASES
            if case.architecture == architecture
            for control in case.controls
        }
        loras = {}
        if architecture == WITH_LORAS:
            loras = {
                "loras": {name: str(self._lora(name)) for name in LORAS if name != FUSED},
                "variants": {FUSED: [(str(self._lora(FUSED)), 1.0)]},
            }
        export_checkpoint(
            str(self._checkpoint(architecture)),
            folder,
            controlnets=controls,
            safety_checker=architecture == WITH_SAFETY_CHECKER,
            progress=self._progress,
            **loras,
        )
        return folder


def _random_lora(unet: torch.nn.Module, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, module in unet.named_modules():
        if not name.endswith(("to_q", "to_k", "to_v", "to_out.0", "proj_in", "ff.net.2")):
            continue
        out_features, in_features = module.weight.shape[:2]
        kernel = tuple(module.weight.shape[2:])
        scale = LORA_STRENGTH * float(module.weight.detach().std()) * in_features**0.5
        down = torch.randn((LORA_RANK, in_features, *kernel), generator=generator)
        up = torch.randn((out_features, LORA_RANK, *kernel), generator=generator)
        weights[f"unet.{name}.lora_A.weight"] = down / in_features**0.5
        weights[f"unet.{name}.lora_B.weight"] = up * scale / LORA_RANK**0.5
    return weights
