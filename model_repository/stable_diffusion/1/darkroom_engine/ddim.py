"""DDIM (Song et al. 2020, arXiv:2010.02502) as a coefficient table."""

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


@dataclass(frozen=True)
class DDIM:
    """Equation 12 of the paper, with the noise of its equation 16. diffusers: DDIMScheduler."""

    has_own_timesteps: ClassVar[bool] = False
    eta: float = 0.0
    """0 is deterministic, 1 is as much noise as DDPM adds."""

    def table(self, schedule: NoiseSchedule, num_inference_steps: int) -> SolverTable:
        timesteps = schedule.one_step_timesteps(num_inference_steps).round()
        levels = schedule.levels_at(timesteps)
        # Where each step ends is counted from where it starts, not read off the next one's start.
        sigmas = np.array(schedule.train_sigmas)
        end_timesteps = timesteps.astype(int) - len(sigmas) // num_inference_steps
        last = 0.0 if schedule.set_alpha_to_one else sigmas[0]
        ends = np.where(end_timesteps < 0, last, sigmas[end_timesteps])

        alpha, sigma = levels.starts.T
        end_alpha = 1 / np.sqrt(ends**2 + 1)
        end_sigma = ends * end_alpha
        fresh = self.eta * end_sigma / sigma * np.sqrt(1 - (alpha / end_alpha) ** 2)
        kept = np.sqrt(end_sigma**2 - fresh**2)
        advance = np.zeros((levels.num_steps, NUM_TERMS))
        # eps = (x_t - alpha x_0) / sigma
        advance[:, SAMPLE] = kept / sigma
        advance[:, PREDICTION] = end_alpha - kept * alpha / sigma
        advance[:, NOISE] = fresh
        return SolverTable(
            timesteps=timesteps,
            levels=levels.starts,
            convert=x0_weights(levels, schedule.prediction_type),
            correct=uncorrected(levels.num_steps),
            advance=advance,
            is_stochastic=self.eta > 0,
        )
