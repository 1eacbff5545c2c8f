"""DPM-Solver++(2M) and its SDE form (Lu et al. 2022, arXiv:2211.01095) as coefficient tables."""

from dataclasses import dataclass

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
class DPMSolver2M:
    """Multistep, order 2, midpoint form: Algorithm 2 of the paper, or its equation 18 if `is_sde`.

    diffusers: DPMSolverMultistepScheduler with algorithm_type dpmsolver++ or sde-dpmsolver++.
    """

    is_sde: bool = False
    use_karras_sigmas: bool = False

    def table(self, schedule: NoiseSchedule, num_inference_steps: int) -> SolverTable:
        levels = schedule.levels(
            num_inference_steps,
            use_karras_sigmas=self.use_karras_sigmas,
            final_sigmas_type="zero",
        )
        alpha, sigma, lam = levels.alpha, levels.sigma, levels.log_snr
        num_steps = levels.num_steps
        advance = np.zeros((num_steps, NUM_TERMS))
        for s in range(num_steps):
            t = s + 1
            h = lam[t] - lam[s]
            if self.is_sde:
                gain = -alpha[t] * np.expm1(-2 * h)
                advance[s, SAMPLE] = sigma[t] / sigma[s] * np.exp(-h)
                advance[s, NOISE] = sigma[t] * np.sqrt(-np.expm1(-2 * h))
            else:
                gain = -alpha[t] * np.expm1(-h)
                advance[s, SAMPLE] = sigma[t] / sigma[s]
            advance[s, PREDICTION] = gain
            # The first step has no history, and the last ends at noise level zero, where only
            # order 1 is finite.
            if 0 < s < num_steps - 1:
                r = (lam[s] - lam[s - 1]) / h
                advance[s, PREDICTION] += gain / (2 * r)
                advance[s, PREDICTION + 1] = -gain / (2 * r)
        return SolverTable(
            timesteps=levels.timesteps,
            convert=x0_weights(levels, schedule.prediction_type),
            correct=uncorrected(num_steps),
            advance=advance,
            is_stochastic=self.is_sde,
        )
