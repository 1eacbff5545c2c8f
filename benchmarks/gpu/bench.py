"""One model under measurement: its engine, its rivals, and what has been learnt of both."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from benchmarks.gpu import networks
from benchmarks.gpu.card import PeakMemory
from benchmarks.gpu.clock import Clock
from benchmarks.gpu.models import Model
from benchmarks.gpu.peers import Pipeline
from benchmarks.gpu.scale import Scale
from benchmarks.gpu.service import ANSWER_TIMEOUT_S, Ours
from benchmarks.gpu.session import Session
from benchmarks.gpu.summary import Solo
from benchmarks.workload import Request

GUIDANCE_SCALE = 7.5
OFF = 1.0
"""A guidance scale that takes one row."""
MIXED_GUIDANCE = (GUIDANCE_SCALE, GUIDANCE_SCALE, GUIDANCE_SCALE, OFF)
"""A quarter of the mixed requests is not guided."""
POLICIES = ("step-level", "request-level", "one at a time")


@dataclass(frozen=True)
class Choices:
    """What of a part is to be measured."""

    configurations: tuple[str, ...] = ("graphs", "eager")
    """How the networks run; the engine takes the first."""
    policies: tuple[str, ...] = POLICIES
    shares: tuple[float, ...] | None = None
    """Loads, as shares of the capacity; None takes those of the scale."""


class Bench:
    """What the parts have in common. The engine is started when it is first needed, and kept."""

    def __init__(self, model: Model, scale: Scale, session: Session, choices: Choices) -> None:
        self.model = model
        self.scale = scale
        self.session = session
        self.choices = choices
        self.clock = Clock(model.device)
        self.max_rows = scale.max_rows[model.name]
        self.operations = networks.count_operations(model)
        self.started: dict[str, Any] = {}
        """How the engine started, once it did."""
        self.solo: Solo | None = None
        self.capacity_per_s: float | None = None
        self._ours: Ours | None = None

    def ours(self) -> Ours:
        """Our engine, warm."""
        if self._ours is None:
            configuration = self.choices.configurations[0]
            with PeakMemory(self.clock) as memory:
                made = networks.torch_networks(self.model, configuration, self.max_rows)
                ours = Ours(self.model.manifest(), made, self.max_rows)
                seconds = ours.start()
            self._ours = ours
            self.started |= {
                "configuration": configuration,
                "max_rows": self.max_rows,
                "start_s": round(seconds, 1),
                "memory_bytes": memory.bytes,
            }
        return self._ours

    @contextmanager
    def pipeline(self, dtype: torch.dtype) -> Iterator[Pipeline]:
        """A pipeline of diffusers, for the time of the block."""
        made = Pipeline(self.model, dtype)
        try:
            yield made
        finally:
            del made
            networks.free_memory()

    def close(self) -> None:
        """End the engine, and give its memory back."""
        if self._ours is not None:
            self._ours.close()
            self._ours = None
        networks.free_memory()

    def latents(self, request: Request) -> NDArray[np.float32]:
        """(C, h, w) of a request that the engine has for itself."""
        answer = self.ours().submit_as(request, "latent").result(ANSWER_TIMEOUT_S)
        return read_latents(answer.picture)

    def levels(self, request: Request) -> NDArray[np.uint8]:
        """The picture of a request that the engine has for itself, (H, W, 3)."""
        return read_levels(self.ours().submit_as(request, "png").result(ANSWER_TIMEOUT_S).picture)

    def share_of_matmul(self, tflops: float) -> float | None:
        """Of the rate of a large product of matrices here; None if it was not measured."""
        card = self.session.result.get("card", {})
        if "matmul" not in card:
            return None
        return round(tflops / card["matmul"]["tflops"]["median"], 4)


def read_latents(picture: bytes) -> NDArray[np.float32]:
    """An answer in the format "latent"."""
    latents: NDArray[np.float32] = np.load(BytesIO(picture), allow_pickle=False)
    return latents


def read_levels(picture: bytes) -> NDArray[np.uint8]:
    """An answer in a picture's format, (H, W, 3)."""
    return np.asarray(Image.open(BytesIO(picture)))
