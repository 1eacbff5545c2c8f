"""The checkpoint's own safety checker, and what is done with what it says."""

from enum import StrEnum

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from darkroom_engine.errors import NetworkFailed
from darkroom_engine.manifest import Manifest
from darkroom_engine.steady import SteadyNetworks

OUTPUT = "has_nsfw_concept"


class SafetyMode(StrEnum):
    OFF = "off"
    FLAG = "flag"
    """`info` tells of it."""
    BLANK = "blank"
    """The picture is black besides, as in diffusers."""


class SafetyChecker:
    """Looks at finished pictures."""

    def __init__(self, manifest: Manifest, networks: SteadyNetworks, mode: SafetyMode) -> None:
        """Look as the manifest's record says.

        Raises:
            ValueError: there is something to be checked, and nothing to check it with.
        """
        record = manifest.safety_checker
        if record is None and mode is not SafetyMode.OFF:
            raise ValueError(
                f"safety_checker: {mode} needs one, and the repository was exported without; "
                "allowed is off"
            )
        self.mode = mode
        self._networks = networks
        self._record = dict(record or {})

    def rehearse(self, timeout_s: float) -> None:
        """Make the network's first call."""
        if self.mode is SafetyMode.OFF:
            return
        size = self._record["size"]
        inputs = {"clip_input": np.zeros((1, 3, size, size), np.float32)}
        self._networks.first_run(self._record["network"], inputs, [OUTPUT], timeout_s)

    def check(self, pixels: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], bool | None]:
        """A picture (H, W, 3), blank if it must be, and what was found; None if nobody looked.

        Raises:
            NetworkFailed: the checker cannot tell.
        """
        if self.mode is SafetyMode.OFF:
            return pixels, None
        inputs = {"clip_input": self._clip_input(pixels)[None]}
        (found,) = self._networks.run(self._record["network"], inputs, [OUTPUT])
        if not np.isfinite(found).all():
            raise NetworkFailed(self._record["network"], "output is not finite")
        is_nsfw = bool(found.reshape(-1)[0])
        if is_nsfw and self.mode is SafetyMode.BLANK:
            pixels = np.zeros_like(pixels)
        return pixels, is_nsfw

    def _clip_input(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """(3, size, size), as CLIP's image processor makes it: the middle of the picture."""
        size = self._record["size"]
        picture = Image.fromarray(pixels)
        short = min(picture.size)
        width, height = (side * size // short for side in picture.size)
        small = picture.resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - size) // 2, (height - size) // 2
        middle = np.asarray(small.crop((left, top, left + size, top + size)), np.float32) / 255
        mean, std = (np.array(self._record[name], np.float32) for name in ("mean", "std"))
        return np.ascontiguousarray(((middle - mean) / std).transpose(2, 0, 1))
