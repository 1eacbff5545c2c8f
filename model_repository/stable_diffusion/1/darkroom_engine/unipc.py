"""UniPC (Zhao et al. 2023, arXiv:2302.04867) as a coefficient table.

The predictor UniP-p and the corrector UniC-p share one form. From s to t, with h = lambda_t -
lambda_s, predictions m and r_k = (lambda_k - lambda_s) / h,

    x_t = (sigma_t / sigma_s) x_s - alpha_t (e^-h - 1) m_s - alpha_t B(h) sum_k rho_k D_k / r_k

where D_k = m_k - m_s runs over earlier predictions and, in the corrector, also over the
prediction at t itself (r = 1). That is equation 9 for data prediction; noise prediction
(equation 3) swaps alpha and sigma and the sign of h.
"""

import math
from dataclasses import dataclass

import numpy as np

from darkroom_engine.schedule import Floats, NoiseLevels, Schedule
from darkroom_engine.solver import (
    LAST,
    MAX_ORDER,
    NUM_TERMS,
    PREDICTION,
    SAMPLE,
    SolverTable,
    x0_weights,
)


@dataclass(frozen=True)
class UniPC:
    """The variants of UniPC; names and defaults are those of diffusers' UniPCMultistepScheduler."""

    solver_order: int = 2
    solver_type: str = "bh2"
    predict_x0: bool = True
    lower_order_final: bool = True
    disable_corrector: tuple[int, ...] = ()
    use_karras_sigmas: bool = False
    final_sigmas_type: str = "zero"
    begin_index: int = 0
    """The step that a run begins with, which has no history; the rows before it mean nothing."""

    def __post_init__(self) -> None:
        if not 1 <= self.solver_order <= MAX_ORDER:
            raise ValueError(f"solver_order: {self.solver_order} is outside 1 to {MAX_ORDER}")
        if self.solver_type not in ("bh1", "bh2"):
            raise ValueError(f"solver_type: {self.solver_type!r} is not bh1 or bh2")

    @property
    def has_own_timesteps(self) -> bool:
        return self.use_karras_sigmas

    def table(self, schedule: Schedule, num_inference_steps: int) -> SolverTable:
        """The coefficients of `num_inference_steps` steps on `schedule`.

        Raises:
            ValueError: the variant has no finite coefficients on this schedule.
        """
        levels = schedule.levels(
            num_inference_steps,
            use_karras_sigmas=self.use_karras_sigmas,
            final_sigmas_type=self.final_sigmas_type,
        )
        num_steps = levels.num_steps
        correct = np.zeros((num_steps, NUM_TERMS))
        advance = np.zeros((num_steps, NUM_TERMS))
        order = 0
        for step in range(self.begin_index, num_steps):
            if step > self.begin_index and step - 1 not in self.disable_corrector:
                # The corrector redoes the step that led here, with the order of that step.
                update = self._update(levels, step - 1, order, corrector=True)
                correct[step, LAST] = update.sample
                correct[step, PREDICTION] = update.target
                correct[step, PREDICTION + 1 : PREDICTION + 1 + order] = update.predictions
            else:
                correct[step, SAMPLE] = 1.0
            order = self._order(step, num_steps)
            update = self._update(levels, step, order, corrector=False)
            advance[step] = update.sample * correct[step]
            advance[step, PREDICTION : PREDICTION + order] += update.predictions
        return SolverTable(
            timesteps=levels.timesteps,
            levels=levels.starts,
            convert=self._convert(levels, schedule.prediction_type),
            correct=correct,
            advance=advance,
            preview=np.array([0, 1]) if self.predict_x0 else x0_weights(levels, "epsilon"),
        )

    def _order(self, step: int, num_steps: int) -> int:
        order = self.solver_order
        if self.lower_order_final:
            order = min(order, num_steps - step)
        return min(order, step - self.begin_index + 1)

    def _convert(self, levels: NoiseLevels, prediction_type: str) -> Floats:
        """(S, 2) weights of (x_t, output) in x_0 if `predict_x0`, else in eps."""
        to_x0 = x0_weights(levels, prediction_type)
        if self.predict_x0:
            return to_x0
        # eps = (x_t - alpha x_0) / sigma
        alpha, sigma = levels.alpha[:-1, None], levels.sigma[:-1, None]
        to_noise: Floats = (np.array([1.0, 0.0]) - alpha * to_x0) / sigma
        return to_noise

    def _update(self, levels: NoiseLevels, s: int, order: int, *, corrector: bool) -> "_Update":
        """The weights of the step from level s to s + 1."""
        alpha, sigma, lam = levels.alpha, levels.sigma, levels.log_snr
        t = s + 1
        h = lam[t] - lam[s]
        if self.predict_x0:
            hh = -h
            sample = sigma[t] / sigma[s]
            outer = alpha[t]
            first = alpha[t] * np.expm1(hh)
        else:
            hh = h
            sample = alpha[t] / alpha[s]
            outer = sigma[t]
            # sigma_t (e^h - 1), written so that it stays finite where sigma_t is zero.
            first = alpha[t] * sigma[s] / alpha[s] - sigma[t]
        predictions = np.zeros(order)
        predictions[0] = -first
        num_differences = order if corrector else order - 1
        if num_differences == 0:
            return _Update(sample, predictions, 0.0)

        with np.errstate(divide="ignore", invalid="ignore"):
            big_b = hh if self.solver_type == "bh1" else np.expm1(hh)
            ratios = [(lam[s - k] - lam[s]) / h for k in range(1, order)]
            rho = _rho(np.array([*ratios, 1.0]), hh, big_b, num_differences)
            target = 0.0
            for k, ratio in enumerate(ratios, start=1):
                weight = -outer * big_b * rho[k - 1] / ratio
                predictions[k] += weight
                predictions[0] -= weight
            if corrector:
                target = -outer * big_b * rho[-1]
                predictions[0] -= target
        return _Update(sample, predictions, target)


@dataclass(frozen=True)
class _Update:
    """Weights of x_s, of the predictions at s, s - 1, ..., and of the prediction at t."""

    sample: float
    predictions: Floats
    target: float


def _rho(ratios: Floats, hh: float, big_b: float, count: int) -> Floats:
    """The first `count` of the rho of equation 5: R(p) rho = phi(p) / B(h).

    One unknown is set to 1/2, as the authors do: it keeps the order and needs no solve.
    """
    if count == 1:
        return np.array([0.5])
    rows = []
    right = []
    phi = np.expm1(hh) / hh - 1
    for i in range(1, count + 1):
        rows.append(ratios[:count] ** (i - 1))
        right.append(phi * math.factorial(i) / big_b)
        phi = phi / hh - 1 / math.factorial(i + 1)
    if not (np.isfinite(hh) and np.isfinite(right).all()):
        # A step of infinite or of no length; the table refuses what is not finite.
        return np.full(count, np.nan)
    return np.linalg.solve(np.array(rows), np.array(right))
