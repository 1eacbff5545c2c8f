"""Euler's method, and its ancestral form, as coefficient tables."""

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
class Euler:
    """Algorithm 2 of Karras et al. 2022 (arXiv:2206.00364) without churn, or its ancestral form.

    The paper's sample is x / alpha here, and its sigma our ratio sigma / alpha. diffusers:
    EulerDiscreteScheduler and EulerAncestralDiscreteScheduler.
    """

    has_own_timesteps: ClassVar[bool] = False
    is_ancestral: bool = False

    def table(self, schedule: NoiseSchedule, num_inference_steps: int) -> SolverTable:
        # Fractions of timesteps, in float32, because that is what the UNet is told.
        timesteps = schedule.one_step_timesteps(num_inference_steps).astype(np.float32)
        levels = schedule.levels_at(timesteps.astype(np.float64))
        alpha, ratio = levels.alpha, levels.ratios
        start, end = ratio[:-1], ratio[1:]
        if self.is_ancestral:
            # A step down to less noise than the end has, made up for with fresh noise.
            up = end * np.sqrt(start**2 - end**2) / start
            down = np.sqrt(end**2 - up**2)
        else:
            up, down = np.zeros_like(end), end
        advance = np.zeros((levels.num_steps, NUM_TERMS))
        advance[:, SAMPLE] = alpha[1:] / alpha[:-1] * down / start
        advance[:, PREDICTION] = alpha[1:] * (1 - down / start)
        advance[:, NOISE] = alpha[1:] * up
        largest = ratio[0]
        # What the spacing says about the start: noise alone, or noise on a vanishing picture.
        initial = np.sqrt(largest**2 + 1) if schedule.timestep_spacing == "leading" else largest
        return SolverTable(
            timesteps=levels.timesteps,
            convert=x0_weights(levels, schedule.prediction_type),
            correct=uncorrected(levels.num_steps),
            advance=advance,
            initial_scale=float(initial * alpha[0]),
            is_stochastic=self.is_ancestral,
        )
