"""One picture in the making."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from darkroom_engine.job import Job
from darkroom_engine.noise import GaussianNoise
from darkroom_engine.solver import SAMPLE, SolverTable

Conditioning = dict[str, NDArray[np.float32]]
"""What the UNet is told besides the sample and the timestep, one row, by input name."""


@dataclass(eq=False)
class Sample:
    """The mutable state of one picture between two steps."""

    job: Job
    index: int
    """Which of the request's pictures."""
    table: SolverTable
    latent_shape: tuple[int, int, int]
    """(C, H / 8, W / 8): all that two samples must share to share a UNet call."""
    step: int = 0
    """Steps done."""
    # Set by the engine when the sample is admitted.
    noise: GaussianNoise = field(init=False)
    state: NDArray[np.float32] = field(init=False)
    conditional: Conditioning = field(init=False)
    unconditional: Conditioning = field(init=False)

    @property
    def seed(self) -> int:
        return self.job.request.seed + self.index

    @property
    def num_rows(self) -> int:
        return self.job.request.num_rows

    @property
    def timestep(self) -> float:
        return float(self.table.timesteps[self.step])

    @property
    def is_finished(self) -> bool:
        return self.step == self.table.num_steps

    @property
    def latents(self) -> NDArray[np.float32]:
        """The current x_t, (C, H / 8, W / 8)."""
        latents: NDArray[np.float32] = self.state[SAMPLE]
        return latents
