"""Trajectory consistency sampling (Zheng et al. 2024, arXiv:2402.19159) as a coefficient table."""

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
class TCD:
    """Strategic stochastic sampling, Algorithm 4 of the paper. diffusers: TCDScheduler.

    A step denoises past the next timestep t', down to s = (1 - eta) t', and diffuses back up:

        x_s  = alpha_s x_0 + sigma_s eps
        x_t' = (alpha_t' / alpha_s) x_s + sqrt(1 - alpha_t'^2 / alpha_s^2) z
    """

    has_own_timesteps: ClassVar[bool] = True
    eta: float = 0.3
    """The paper's gamma: 0 is deterministic, 1 denoises fully in every step."""
    original_inference_steps: int = 50
    """Steps of the schedule that the checkpoint was distilled on."""

    def table(self, schedule: NoiseSchedule, num_inference_steps: int) -> SolverTable:
        """As every sampler's.

        Raises:
            TooManySteps: more steps than the distillation had.
        """
        timesteps = schedule.distilled_timesteps(num_inference_steps, self.original_inference_steps)
        # The last step ends at the least noise that was trained, not at none.
        ends = np.append(timesteps[1:], 0)
        # In float32, which decides where the product is nearly a whole number.
        targets = np.floor(np.float32(1 - self.eta) * ends.astype(np.float32)).astype(np.float64)
        levels, end_levels, target_levels = map(schedule.levels_at, (timesteps, ends, targets))

        alpha, sigma = levels.starts.T
        alpha_s, sigma_s = target_levels.alpha[:-1], target_levels.sigma[:-1]
        back = end_levels.alpha[:-1] / alpha_s
        advance = np.zeros((levels.num_steps, NUM_TERMS))
        # eps = (x_t - alpha x_0) / sigma
        advance[:, SAMPLE] = back * sigma_s / sigma
        advance[:, PREDICTION] = back * (alpha_s - sigma_s * alpha / sigma)
        advance[:, NOISE] = np.sqrt(1 - back**2)
        return SolverTable(
            timesteps=timesteps,
            levels=levels.starts,
            convert=x0_weights(levels, schedule.prediction_type),
            correct=uncorrected(levels.num_steps),
            advance=advance,
            is_stochastic=self.eta > 0,
        )
