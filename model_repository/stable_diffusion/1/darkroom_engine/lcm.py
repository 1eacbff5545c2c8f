"""Latent consistency sampling (Luo et al. 2023, arXiv:2310.04378) as a coefficient table."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from darkroom_engine.schedule import NoiseSchedule
from darkroom_engine.solver import (
    NOISE,
    NUM_TERMS,
    PREDICTION,
    SAMPLE,
    SolverTable,
    uncorrected,
    x0_weights,
)

_SIGMA_DATA = 0.5
_TIMESTEP_SCALING = 10.0


@dataclass(frozen=True)
class LCM:
    """Multistep consistency sampling, Algorithm 3 of the paper. diffusers: LCMScheduler."""

    has_own_timesteps: ClassVar[bool] = True
    original_inference_steps: int = 50
    """Steps of the schedule that the checkpoint was distilled on."""
    strength: float = 1.0
    """All steps are made in this share of that schedule, the less noisy one."""

    def table(self, schedule: NoiseSchedule, num_inference_steps: int) -> SolverTable:
        """As every sampler's.

        Raises:
            TooManySteps: more steps than the distillation had.
        """
        total = self.original_inference_steps
        usable = int(total * self.strength)
        timesteps = schedule.distilled_timesteps(num_inference_steps, total, usable)
        levels = schedule.levels_at(timesteps)
        # The boundary condition: at no noise, the network's answer is the sample itself.
        scaled = levels.timesteps * _TIMESTEP_SCALING
        skip = _SIGMA_DATA**2 / (scaled**2 + _SIGMA_DATA**2)
        out = scaled / np.sqrt(scaled**2 + _SIGMA_DATA**2)
        advance = np.zeros((levels.num_steps, NUM_TERMS))
        advance[:, SAMPLE] = levels.alpha[1:] * skip
        advance[:, PREDICTION] = levels.alpha[1:] * out
        # The last level is free of noise, and so is the last step.
        advance[:, NOISE] = levels.sigma[1:]
        return SolverTable(
            timesteps=levels.timesteps,
            levels=levels.starts,
            convert=x0_weights(levels, schedule.prediction_type),
            correct=uncorrected(levels.num_steps),
            advance=advance,
            is_stochastic=True,
        )
