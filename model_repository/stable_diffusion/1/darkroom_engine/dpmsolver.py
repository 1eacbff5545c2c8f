"""DPM-Solver++ and its SDE form (Lu et al. 2022, arXiv:2211.01095) as coefficient tables."""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from darkroom_engine.schedule import FlowSchedule, NoiseLevels, NoiseSchedule, Schedule
from darkroom_engine.solver import (
    LAST,
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
    begin_index: int = 0
    """The step that a run begins with, which has no history; the rows before it mean nothing."""

    @property
    def has_own_timesteps(self) -> bool:
        return self.use_karras_sigmas

    def table(self, schedule: Schedule, num_inference_steps: int) -> SolverTable:
        levels = self._levels(schedule, num_inference_steps)
        lam = levels.log_snr
        num_steps = levels.num_steps
        advance = np.zeros((num_steps, NUM_TERMS))
        for s in range(num_steps):
            t = s + 1
            order1 = _sde_order1(levels, s, t) if self.is_sde else _order1(levels, s, t)
            gain = order1.prediction
            advance[s, SAMPLE] = order1.sample
            advance[s, PREDICTION] = gain
            advance[s, NOISE] = order1.noise
            # The first step has no history, and the last ends at noise level zero, where only
            # order 1 is finite.
            if self.begin_index < s < num_steps - 1:
                r = (lam[s] - lam[s - 1]) / (lam[t] - lam[s])
                advance[s, PREDICTION] += gain / (2 * r)
                advance[s, PREDICTION + 1] = -gain / (2 * r)
        return SolverTable(
            timesteps=levels.timesteps,
            levels=levels.starts,
            convert=x0_weights(levels, schedule.prediction_type),
            correct=uncorrected(num_steps),
            advance=advance,
            is_stochastic=self.is_sde,
        )

    def _levels(self, schedule: Schedule, num_inference_steps: int) -> NoiseLevels:
        if isinstance(schedule, FlowSchedule):
            return schedule.dpm_levels(num_inference_steps)
        return schedule.levels(
            num_inference_steps,
            use_karras_sigmas=self.use_karras_sigmas,
            final_sigmas_type="zero",
        )


@dataclass(frozen=True)
class DPMSolverSDE:
    """Singlestep, order 2, midpoint form: Algorithm 1 of the paper, for the SDE.

    Steps come in pairs: one of order 1 to a point in between, and one of order 2 over the whole
    pair, from the sample where the pair started, with noise of its own. diffusers:
    DPMSolverSinglestepScheduler with algorithm_type sde-dpmsolver++.
    """

    has_own_timesteps: ClassVar[bool] = True
    use_karras_sigmas: bool = False
    begin_index: int = 0
    """The step that a run begins with, which has no history; the rows before it mean nothing."""

    def table(self, schedule: NoiseSchedule, num_inference_steps: int) -> SolverTable:
        levels = replace(schedule, timestep_spacing="linspace").levels(
            num_inference_steps,
            use_karras_sigmas=self.use_karras_sigmas,
            final_sigmas_type="zero",
        )
        lam = levels.log_snr
        num_steps = levels.num_steps
        advance = np.zeros((num_steps, NUM_TERMS))
        for s in range(num_steps):
            t = s + 1
            # The first of a run has no history, even if it is the second of a pair, and the last
            # ends at noise level zero, where only order 1 is finite.
            if s % 2 == 0 or s in (self.begin_index, num_steps - 1):
                order1 = _sde_order1(levels, s, t)
                advance[s, SAMPLE] = order1.sample
                advance[s, PREDICTION] = order1.prediction
            else:
                start = s - 1
                order1 = _sde_order1(levels, start, t)
                r = (lam[s] - lam[start]) / (lam[t] - lam[start])
                advance[s, LAST] = order1.sample
                advance[s, PREDICTION] = order1.prediction / (2 * r)
                advance[s, PREDICTION + 1] = order1.prediction * (1 - 1 / (2 * r))
            advance[s, NOISE] = order1.noise
        return SolverTable(
            timesteps=levels.timesteps,
            levels=levels.starts,
            convert=x0_weights(levels, schedule.prediction_type),
            correct=uncorrected(num_steps),
            advance=advance,
            is_stochastic=True,
        )


@dataclass(frozen=True)
class _Order1:
    """Weights of x_s, of the x_0 predicted there, and of fresh noise in x_t."""

    sample: float
    prediction: float
    noise: float = 0.0


def _order1(levels: NoiseLevels, s: int, t: int) -> _Order1:
    alpha, sigma, lam = levels.alpha, levels.sigma, levels.log_snr
    h = lam[t] - lam[s]
    return _Order1(sample=sigma[t] / sigma[s], prediction=-alpha[t] * np.expm1(-h))


def _sde_order1(levels: NoiseLevels, s: int, t: int) -> _Order1:
    alpha, sigma, lam = levels.alpha, levels.sigma, levels.log_snr
    h = lam[t] - lam[s]
    return _Order1(
        sample=sigma[t] / sigma[s] * np.exp(-h),
        prediction=-alpha[t] * np.expm1(-2 * h),
        noise=sigma[t] * np.sqrt(-np.expm1(-2 * h)),
    )
