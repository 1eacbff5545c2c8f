"""Euler's method, and its ancestral form, as coefficient tables."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from darkroom_engine.schedule import Schedule
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
class Euler:
    """Algorithm 2 of Karras et al. 2022 (arXiv:2206.00364) without churn, or its ancestral form.

    The paper's sample is x / alpha here, and its sigma our ratio sigma / alpha; in x its step keeps
    the noise that the sample says it has, on any schedule. diffusers: EulerDiscreteScheduler,
    EulerAncestralDiscreteScheduler and FlowMatchEulerDiscreteScheduler.
    """

    has_own_timesteps: ClassVar[bool] = False
    is_ancestral: bool = False

    def table(self, schedule: Schedule, num_inference_steps: int) -> SolverTable:
        levels = schedule.one_step_levels(num_inference_steps)
        alpha, sigma = levels.starts.T
        end_alpha, end_sigma = levels.alpha[1:], levels.sigma[1:]
        kept, fresh = end_sigma, np.zeros_like(end_sigma)
        if self.is_ancestral:
            # A step down to less noise than the end has, made up for with fresh noise.
            shrink = end_sigma / end_alpha * alpha / sigma
            kept, fresh = end_sigma * shrink, end_sigma * np.sqrt(1 - shrink**2)
        advance = np.zeros((levels.num_steps, NUM_TERMS))
        # eps = (x_t - alpha x_0) / sigma
        advance[:, SAMPLE] = kept / sigma
        advance[:, PREDICTION] = end_alpha - kept * alpha / sigma
        advance[:, NOISE] = fresh
        return SolverTable(
            timesteps=levels.timesteps,
            levels=levels.starts,
            convert=x0_weights(levels, schedule.prediction_type),
            correct=uncorrected(levels.num_steps),
            advance=advance,
            initial_scale=1.0 if schedule.starts_with_unit_noise else float(sigma[0]),
            is_stochastic=self.is_ancestral,
        )
