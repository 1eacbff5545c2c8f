"""One of the networks that read prompts."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from darkroom_engine.arrays import Array
from darkroom_engine.errors import NetworkFailed
from darkroom_engine.manifest import ManifestError
from darkroom_engine.networks import Networks
from darkroom_engine.tokenizer import PromptTokenizer

CLIP = "clip"
NAMES = {CLIP: "CLIP", "t5": "T5"}
"""What people call each kind of text encoder."""


@dataclass(frozen=True)
class TextEncoder:
    """A network that reads prompts, and how: one of the manifest's `text.encoders`."""

    network: str
    kind: str
    tokenizer: PromptTokenizer
    hidden: str
    """The output (B, L, C) that conditions."""
    layers: str | None
    """The output (B, K, L, C) of all layers, the last of which is `hidden`; None if that alone can
    condition."""
    pooled: str | None
    """The output (B, P) that sums a text up, if any."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any], directory: Path) -> "TextEncoder":
        """Read a record of the manifest; its files are relative to `directory`.

        Raises:
            ManifestError: the encoder is of a kind that is not known here.
        """
        kind = config["kind"]
        if kind not in NAMES:
            raise ManifestError(
                f"text: {config['network']} is of kind {kind!r}, known are {', '.join(NAMES)}"
            )
        tokenizer = PromptTokenizer.from_config(config["tokenizer"], directory)
        return cls(**{**config, "tokenizer": tokenizer})

    @property
    def is_clip(self) -> bool:
        return self.kind == CLIP

    @property
    def probe_call(self) -> tuple[str, dict[str, Array], list[str]]:
        """The network, inputs and outputs of a call of one row that nobody needs."""
        blank = np.zeros((1, self.tokenizer.max_length), np.int64)
        return self.network, {"input_ids": blank}, self._outputs(0)

    def run(
        self, networks: Networks, network: str, ids: NDArray[np.int64], clip_skip: int
    ) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        """Token ids (N, L) to hidden states (N, L, C), and what sums up the first row, (P,).

        Both may be views of what the network answered.

        Args:
            network: runs in the place of `self.network`.
            clip_skip: how many of the last layers are left out, if they can be.

        Raises:
            NetworkFailed: the network failed, or made something of another shape.
        """
        hidden, *pooled = networks.run(network, {"input_ids": ids}, self._outputs(clip_skip))
        if clip_skip and self.layers:
            hidden = hidden[:, -(clip_skip + 1)]
        if hidden.ndim != 3 or hidden.shape[:2] != ids.shape:
            raise NetworkFailed(network, f"made {hidden.shape} of {ids.shape}")
        return hidden, pooled[0][0] if pooled else None

    def _outputs(self, clip_skip: int) -> list[str]:
        hidden = self.layers if clip_skip and self.layers else self.hidden
        return [hidden, self.pooled] if self.pooled else [hidden]
