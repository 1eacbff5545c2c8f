"""Noise schedules: which noise levels a sampler visits, as plain float64 arrays.

Variance-preserving notation of DPM-Solver (Lu et al. 2022, arXiv:2206.00927): a noisy sample is
x_t = alpha_t x_0 + sigma_t eps, and lambda_t = log(alpha_t / sigma_t). The "k-diffusion" noise
level of other papers is the ratio sigma_t / alpha_t.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
TIMESTEP_SPACINGS = ("linspace", "leading", "trailing")


class TooManySteps(ValueError):
    """A distilled checkpoint was asked for more steps than it was distilled on."""


@dataclass(frozen=True)
class NoiseLevels:
    """The levels that a run of S steps visits, and where it ends."""

    timesteps: Floats
    """(S,) what the UNet is told at each step."""
    ratios: Floats
    """(S + 1,) sigma / alpha at each step and at the end, descending; the end may be 0."""

    @property
    def num_steps(self) -> int:
        return len(self.timesteps)

    @property
    def alpha(self) -> Floats:
        alpha: Floats = 1 / np.sqrt(self.ratios**2 + 1)
        return alpha

    @property
    def sigma(self) -> Floats:
        return self.ratios * self.alpha

    @property
    def log_snr(self) -> Floats:
        """lambda; +inf where the end is free of noise."""
        with np.errstate(divide="ignore"):
            return -np.log(self.ratios)


@dataclass(frozen=True)
class NoiseSchedule:
    """The discrete schedule a checkpoint was trained with; names are diffusers' config keys."""

    train_sigmas: tuple[float, ...]
    """sigma / alpha at every training timestep, ascending, as diffusers rounds it to float32.

    Data, not a formula: checkpoints are run with these rounded values everywhere, and at high
    noise a difference of 1e-6 shows in the picture.
    """
    prediction_type: str
    timestep_spacing: str
    steps_offset: int = 0
    set_alpha_to_one: bool = True
    """Whether DDIM ends free of noise, rather than at the least noise that was trained."""

    def __post_init__(self) -> None:
        for key, value, allowed in (
            ("prediction_type", self.prediction_type, PREDICTION_TYPES),
            ("timestep_spacing", self.timestep_spacing, TIMESTEP_SPACINGS),
        ):
            if value not in allowed:
                raise ValueError(f"{key}: {value!r} is not one of {', '.join(allowed)}")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "NoiseSchedule":
        """Read the manifest's `noise_schedule`."""
        return cls(**{**config, "train_sigmas": tuple(config["train_sigmas"])})

    def levels(
        self, num_inference_steps: int, *, use_karras_sigmas: bool, final_sigmas_type: str
    ) -> NoiseLevels:
        """The noise levels of a multistep solver with `num_inference_steps` steps.

        `timestep_spacing` is Table 2 of Lin et al. 2023 (arXiv:2305.08891); the Karras levels are
        equation 5 of Karras et al. 2022 (arXiv:2206.00364) with rho = 7.
        """
        ratios = np.array(self.train_sigmas)
        if use_karras_sigmas:
            rho = 7.0
            ramp = np.linspace(0, 1, num_inference_steps)
            low, high = ratios[0] ** (1 / rho), ratios[-1] ** (1 / rho)
            visited = (high + ramp * (low - high)) ** rho
            timesteps = np.interp(np.log(visited), np.log(ratios), np.arange(len(ratios))).round()
        else:
            timesteps = self._spaced_timesteps(num_inference_steps)
            visited = np.interp(timesteps, np.arange(len(ratios)), ratios)

        if final_sigmas_type == "zero":
            final = 0.0
        elif final_sigmas_type == "sigma_min":
            final = visited[-1] if use_karras_sigmas else ratios[0]
        else:
            raise ValueError(f"final_sigmas_type: {final_sigmas_type!r} is not zero or sigma_min")
        return _noise_levels(timesteps, visited, final)

    def levels_at(self, timesteps: Floats) -> NoiseLevels:
        """The noise levels of given timesteps, descending, and an end free of noise."""
        visited = np.interp(timesteps, np.arange(len(self.train_sigmas)), self.train_sigmas)
        return _noise_levels(timesteps, visited, 0.0)

    def one_step_timesteps(self, num_inference_steps: int) -> Floats:
        """The timesteps of a one-step solver such as Euler or DDIM, descending, not rounded.

        Unlike those of a multistep solver, they end at the least noise, not a step before it.
        """
        total, count = len(self.train_sigmas), num_inference_steps
        if self.timestep_spacing == "linspace":
            return np.linspace(0, total - 1, count)[::-1]
        if self.timestep_spacing == "leading":
            stride = total // count
            return (np.arange(count - 1, -1, -1) * stride + self.steps_offset).astype(np.float64)
        return np.arange(total, 0, -total / count).round()[:count] - 1

    def distilled_timesteps(
        self, num_inference_steps: int, original_inference_steps: int
    ) -> Floats:
        """The timesteps of a consistency sampler, descending: some of those distilled on.

        Raises:
            TooManySteps: the distillation had fewer, `original_inference_steps`.
        """
        count, total = num_inference_steps, original_inference_steps
        if count > total:
            raise TooManySteps(f"{count} is out of range, allowed are 1 to {total}")
        stride = len(self.train_sigmas) // total
        chosen: Floats = np.floor(np.linspace(0, total, count, endpoint=False))
        return (total - chosen) * stride - 1

    def _spaced_timesteps(self, num_inference_steps: int) -> Floats:
        total, count = len(self.train_sigmas), num_inference_steps
        if self.timestep_spacing == "linspace":
            return np.linspace(0, total - 1, count + 1).round()[:0:-1]
        if self.timestep_spacing == "leading":
            stride = total // (count + 1)
            return (np.arange(count, 0, -1) * stride + self.steps_offset).astype(np.float64)
        return np.arange(total, 0, -total / count).round()[:count] - 1


def _noise_levels(timesteps: Floats, visited: Floats, final: float) -> NoiseLevels:
    # Rounded to float32 for the same reason as train_sigmas.
    ratios = np.append(visited, final).astype(np.float32).astype(np.float64)
    return NoiseLevels(timesteps=timesteps.astype(np.float64), ratios=ratios)
