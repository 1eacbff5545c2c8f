"""Noise schedules: which noise levels a sampler visits, as plain float64 arrays.

Variance-preserving notation of DPM-Solver (Lu et al. 2022, arXiv:2206.00927): a noisy sample is
x_t = alpha_t x_0 + sigma_t eps, and lambda_t = log(alpha_t / sigma_t). The "k-diffusion" noise
level of other papers is the ratio sigma_t / alpha_t. A schedule of flow matching is not variance
preserving, but of the same form: its alpha_t is 1 - sigma_t.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

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
    alpha: Floats
    """(S + 1,) how much of x_0 is in a sample, at each step and at the end, ascending."""
    sigma: Floats
    """(S + 1,) how much noise is in it, descending; the end may be 0."""

    @property
    def num_steps(self) -> int:
        return len(self.timesteps)

    @property
    def starts(self) -> Floats:
        """(S, 2) alpha and sigma at the start of each step."""
        starts: Floats = np.stack([self.alpha, self.sigma], axis=1)[:-1]
        return starts

    @property
    def log_snr(self) -> Floats:
        """lambda; +inf where the end is free of noise."""
        with np.errstate(divide="ignore"):
            log_snr: Floats = np.log(self.alpha / self.sigma)
        return log_snr


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

    @property
    def num_train_timesteps(self) -> int:
        return len(self.train_sigmas)

    @property
    def starts_with_unit_noise(self) -> bool:
        """Whether Euler's method starts from noise of size 1, rather than of its first level's."""
        return self.timestep_spacing == "leading"

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

        least = visited[-1] if use_karras_sigmas else ratios[0]
        return _preserving_levels(timesteps, visited, _final(final_sigmas_type, least))

    def one_step_levels(self, num_inference_steps: int) -> NoiseLevels:
        """The noise levels of Euler's method."""
        # Fractions of timesteps, in float32, because that is what the UNet is told.
        timesteps = self.one_step_timesteps(num_inference_steps).astype(np.float32)
        return self.levels_at(timesteps.astype(np.float64))

    def levels_at(self, timesteps: Floats) -> NoiseLevels:
        """The noise levels of given timesteps, descending, and an end free of noise."""
        visited = np.interp(timesteps, np.arange(len(self.train_sigmas)), self.train_sigmas)
        return _preserving_levels(timesteps, visited, 0.0)

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
        self,
        num_inference_steps: int,
        original_inference_steps: int,
        num_usable: int | None = None,
    ) -> Floats:
        """The timesteps of a consistency sampler, descending: some of those distilled on.

        Args:
            num_usable: only so many of the least noisy ones are used; None for all.

        Raises:
            TooManySteps: the distillation had fewer, `original_inference_steps`, or fewer are used.
        """
        count, total = num_inference_steps, original_inference_steps
        usable = total if num_usable is None else num_usable
        if count > usable:
            raise TooManySteps(f"{count} is out of range, allowed are 1 to {usable}")
        stride = len(self.train_sigmas) // total
        chosen: Floats = np.floor(np.linspace(0, usable, count, endpoint=False))
        return (usable - chosen) * stride - 1

    def _spaced_timesteps(self, num_inference_steps: int) -> Floats:
        total, count = len(self.train_sigmas), num_inference_steps
        if self.timestep_spacing == "linspace":
            return np.linspace(0, total - 1, count + 1).round()[:0:-1]
        if self.timestep_spacing == "leading":
            stride = total // (count + 1)
            return (np.arange(count, 0, -1) * stride + self.steps_offset).astype(np.float64)
        return np.arange(total, 0, -total / count).round()[:count] - 1


@dataclass(frozen=True)
class FlowSchedule:
    """The schedule of a rectified flow (Liu et al. 2022, arXiv:2209.03003); names as in diffusers.

    The network predicts the velocity eps - x_0. Equation 23 of Esser et al. 2024 (arXiv:2403.03206)
    shifts evenly spaced levels towards noise.
    """

    shift: float
    num_train_timesteps: int
    prediction_type: str = "flow_prediction"
    starts_with_unit_noise: ClassVar[bool] = True

    def levels(
        self, num_inference_steps: int, *, use_karras_sigmas: bool, final_sigmas_type: str
    ) -> NoiseLevels:
        """The noise levels of UniPC. Its first step has next to no x_0, rather than none."""
        if use_karras_sigmas:
            raise ValueError("use_karras_sigmas: a flow schedule has no Karras levels")
        least = 1 / self.num_train_timesteps
        sigma = self._shifted(np.linspace(1, least, num_inference_steps + 1)[:-1])
        if abs(sigma[0] - 1) < 1e-6:
            sigma[0] -= 1e-6
        return self._whole_timesteps(sigma, _final(final_sigmas_type, sigma[-1]))

    def dpm_levels(self, num_inference_steps: int) -> NoiseLevels:
        """The noise levels of DPM-Solver++. Its first step is one training timestep below noise."""
        kept = np.linspace(1, 1 / self.num_train_timesteps, num_inference_steps + 1)
        return self._whole_timesteps(self._shifted(1 - kept)[:0:-1], 0.0)

    def one_step_levels(self, num_inference_steps: int) -> NoiseLevels:
        """The noise levels of Euler's method, from noise alone."""
        total = self.num_train_timesteps
        # The ends are shifted as those of the training schedule, in float32, and then as visited.
        first, last = self._shifted(np.array([total, 1], np.float32) / np.float32(total)).tolist()
        spaced = np.linspace(first * total, last * total, num_inference_steps) / total
        sigma = self._shifted(spaced).astype(np.float32)
        return _flow_levels(sigma * np.float32(total), sigma, 0.0)

    def _whole_timesteps(self, sigma: Floats, final: float) -> NoiseLevels:
        return _flow_levels(np.trunc(sigma * self.num_train_timesteps), sigma, final)

    def _shifted(self, sigma: NDArray[Any]) -> NDArray[Any]:
        return self.shift * sigma / (1 + (self.shift - 1) * sigma)


Schedule = NoiseSchedule | FlowSchedule


def schedule_from_config(config: Mapping[str, Any]) -> Schedule:
    """Read the manifest's `noise_schedule`, whose `prediction_type` says of which kind it is."""
    if config["prediction_type"] == "flow_prediction":
        return FlowSchedule(**config)
    return NoiseSchedule.from_config(config)


def _final(final_sigmas_type: str, least: float) -> float:
    if final_sigmas_type == "zero":
        return 0.0
    if final_sigmas_type == "sigma_min":
        return least
    raise ValueError(f"final_sigmas_type: {final_sigmas_type!r} is not zero or sigma_min")


def _preserving_levels(timesteps: Floats, ratios: Floats, final: float) -> NoiseLevels:
    ratios = _rounded(ratios, final)
    alpha = 1 / np.sqrt(ratios**2 + 1)
    return NoiseLevels(timesteps.astype(np.float64), alpha=alpha, sigma=ratios * alpha)


def _flow_levels(timesteps: NDArray[Any], sigma: NDArray[Any], final: float) -> NoiseLevels:
    sigma = _rounded(sigma, final)
    return NoiseLevels(timesteps.astype(np.float64), alpha=1 - sigma, sigma=sigma)


def _rounded(visited: NDArray[Any], final: float) -> Floats:
    # To float32, for the same reason as train_sigmas.
    return np.append(visited, final).astype(np.float32).astype(np.float64)
