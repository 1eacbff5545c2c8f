"""One picture in the making."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from darkroom_engine.job import Job
from darkroom_engine.noise import GaussianNoise
from darkroom_engine.solver import SAMPLE, SolverTable

Shape = tuple[int, int, int]
"""(C, H / 8, W / 8) of latents."""

Conditioning = dict[str, NDArray[np.float32]]
"""What the UNet is told besides the sample and the timestep, one row, by input name."""


@dataclass(eq=False, repr=False)
class Sample:
    """The mutable state of one picture between two steps."""

    job: Job
    index: int
    """Which of the request's pictures."""
    table: SolverTable
    latent_shape: Shape
    """All that two samples must share to share a UNet call."""
    step: int = 0
    """Steps done."""
    is_started: bool = False
    """Whether the engine has set the rest, which it does before the first step."""
    noise: GaussianNoise = field(init=False)
    state: NDArray[np.float32] = field(init=False)
    conditional: Conditioning = field(init=False)
    unconditional: Conditioning = field(init=False)

    @property
    def seed(self) -> int:
        return self.job.request.seed + self.index

    @property
    def is_guided(self) -> bool:
        """Whether the next step takes the unconditional prediction too."""
        return self.step in self.job.request.guided_steps

    @property
    def num_rows(self) -> int:
        """Rows that the next step takes."""
        return 2 if self.is_guided else 1

    @property
    def num_row_steps(self) -> int:
        """Rows of all steps that are left."""
        guided = self.job.request.guided_steps
        first = max(guided.start, self.step)
        return self.num_steps_left + max(0, guided.stop - first)

    @property
    def num_steps_left(self) -> int:
        return self.table.num_steps - self.step

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
