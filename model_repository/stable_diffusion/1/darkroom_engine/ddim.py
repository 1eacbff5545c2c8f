"""DDIM (Song et al. 2020, arXiv:2010.02502) as a coefficient table."""

import numpy as np

from darkroom_engine.schedule import NoiseSchedule
from darkroom_engine.solver import (
    NUM_TERMS,
    PREDICTION,
    SAMPLE,
    SolverTable,
    uncorrected,
    x0_weights,
)


class DDIM:
    """Equation 12 of the paper, deterministic. diffusers: DDIMScheduler with eta 0."""

    def table(self, schedule: NoiseSchedule, num_inference_steps: int) -> SolverTable:
        timesteps = schedule.one_step_timesteps(num_inference_steps).round()
        levels = schedule.levels_at(timesteps)
        # Where each step ends is counted from where it starts, not read off the next one's start.
        sigmas = np.array(schedule.train_sigmas)
        end_timesteps = timesteps.astype(int) - len(sigmas) // num_inference_steps
        last = 0.0 if schedule.set_alpha_to_one else sigmas[0]
        ends = np.where(end_timesteps < 0, last, sigmas[end_timesteps])

        alpha, sigma = levels.alpha[:-1], levels.sigma[:-1]
        end_alpha = 1 / np.sqrt(ends**2 + 1)
        end_sigma = ends * end_alpha
        advance = np.zeros((levels.num_steps, NUM_TERMS))
        # eps = (x_t - alpha x_0) / sigma
        advance[:, SAMPLE] = end_sigma / sigma
        advance[:, PREDICTION] = end_alpha - end_sigma * alpha / sigma
        return SolverTable(
            timesteps=timesteps,
            convert=x0_weights(levels, schedule.prediction_type),
            correct=uncorrected(levels.num_steps),
            advance=advance,
        )
