"""The samplers a request may name, each a rule that makes a coefficient table."""

import math
from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from functools import lru_cache
from typing import Any, Protocol

from darkroom_engine.ddim import DDIM
from darkroom_engine.dpmsolver import DPMSolver2M, DPMSolverSDE
from darkroom_engine.euler import Euler
from darkroom_engine.lcm import LCM
from darkroom_engine.schedule import (
    TIMESTEP_SPACINGS,
    Floats,
    FlowSchedule,
    NoiseSchedule,
    Schedule,
    TooManySteps,
    schedule_from_config,
)
from darkroom_engine.solver import SolverTable
from darkroom_engine.tcd import TCD
from darkroom_engine.unipc import UniPC


class BadChoice(ValueError):
    """A sampler cannot do what was chosen; `field` is the field of the request to change."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field
        self.problem = problem


class Sampler(Protocol):
    """A rule that makes the coefficient table of a run."""

    @property
    def has_own_timesteps(self) -> bool:
        """Whether the schedule's `timestep_spacing` is nothing to it."""

    def table(self, schedule: Any, num_inference_steps: int) -> SolverTable:
        """The table of that many steps; ValueError if the rule cannot do that many.

        The schedule is of a kind that `Samplers` offers the rule for.
        """


class Samplers:
    """The samplers of one checkpoint, by name; tables are computed once and kept."""

    def __init__(
        self, schedule: Schedule, unipc: UniPC, *, is_consistency_model: bool = False
    ) -> None:
        """Offer what a schedule allows.

        Args:
            is_consistency_model: whether the checkpoint is one with guidance embedded, whose
                pipelines in diffusers make all steps whatever the strength.
        """
        self._schedule = schedule
        self._is_consistency_model = is_consistency_model
        self._rules: dict[str, Sampler] = (
            _flow_rules(unipc) if isinstance(schedule, FlowSchedule) else _rules(unipc)
        )
        # A table depends on nothing but what was chosen, and takes milliseconds to compute.
        self._kept_table = lru_cache(maxsize=1024)(self._table)

    @classmethod
    def from_config(
        cls,
        noise_schedule: Mapping[str, Any],
        solver: Mapping[str, Any],
        *,
        is_consistency_model: bool = False,
    ) -> "Samplers":
        """Read the manifest's `noise_schedule` and `solver`."""
        options = dict(solver)
        options["disable_corrector"] = tuple(options.get("disable_corrector", ()))
        return cls(
            schedule_from_config(noise_schedule),
            UniPC(**options),
            is_consistency_model=is_consistency_model,
        )

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._rules)

    def table(
        self,
        name: str,
        num_inference_steps: int,
        eta: float | None = None,
        timestep_spacing: str | None = None,
        *,
        strength: float | None = None,
        denoising_start: float | None = None,
        denoising_end: float | None = None,
    ) -> SolverTable:
        """The table of a run, which may be a part of that many steps of a sampler.

        Args:
            name: one of `names`.
            num_inference_steps: 1 or more, of the whole.
            eta: 0 to 1, how much noise the steps of `ddim` and `tcd` add; None is the sampler's
                default, which is diffusers'.
            timestep_spacing: one of TIMESTEP_SPACINGS; None is the checkpoint's own.
            strength: 0 to 1, the share of the steps that are left to do, as for img2img.
            denoising_start: the share of the training timesteps that are done, if not 0, whatever
                `strength` is; the second of an ensemble of experts starts there.
            denoising_end: the share of the training timesteps after which to stop.

        Raises:
            BadChoice: there is no such table.
        """
        return self._kept_table(
            name,
            num_inference_steps,
            eta,
            timestep_spacing,
            strength=strength,
            denoising_start=denoising_start,
            denoising_end=denoising_end,
        )

    def _table(
        self,
        name: str,
        num_inference_steps: int,
        eta: float | None,
        timestep_spacing: str | None,
        *,
        strength: float | None,
        denoising_start: float | None,
        denoising_end: float | None,
    ) -> SolverTable:
        if name not in self._rules:
            raise BadChoice(
                "sampler", f"{name!r} does not exist, there are {', '.join(self.names)}"
            )
        rule = self._rules[name] if eta is None else self._with_eta(name, eta)
        if self._is_consistency_model and isinstance(rule, LCM) and strength is not None:
            rule = _in_part(rule, strength, num_inference_steps)
            strength = None
        schedule = (
            self._schedule if timestep_spacing is None else self._spaced(name, timestep_spacing)
        )
        table = _whole_table(name, rule, schedule, num_inference_steps)
        begin, end = _steps_between(
            table.timesteps, schedule, strength, denoising_start, denoising_end
        )
        if begin > 0 and isinstance(rule, UniPC | DPMSolver2M | DPMSolverSDE):
            late = replace(rule, begin_index=begin)
            table = _whole_table(name, late, schedule, num_inference_steps)
        return table.part(begin, end)

    def _with_eta(self, name: str, eta: float) -> Sampler:
        rule = self._rules[name]
        if not isinstance(rule, DDIM | TCD):
            takers = [name for name, rule in self._rules.items() if isinstance(rule, DDIM | TCD)]
            only = f"only {' and '.join(takers)} take it" if takers else "no sampler here takes it"
            raise BadChoice("eta", f"{only}, not {name}")
        if not 0 <= eta <= 1:
            raise BadChoice("eta", f"{eta:g} is out of range, allowed are 0 to 1")
        return replace(rule, eta=eta)

    def _spaced(self, name: str, timestep_spacing: str) -> NoiseSchedule:
        if timestep_spacing not in TIMESTEP_SPACINGS:
            raise BadChoice(
                "timestep_spacing",
                f"{timestep_spacing!r} does not exist, there are {', '.join(TIMESTEP_SPACINGS)}",
            )
        if isinstance(self._schedule, FlowSchedule) or self._rules[name].has_own_timesteps:
            raise BadChoice("timestep_spacing", f"{name} has timesteps of its own")
        return replace(self._schedule, timestep_spacing=timestep_spacing)


def _rules(unipc: UniPC) -> dict[str, Sampler]:
    return {
        "unipc": unipc,
        "unipc_karras": replace(unipc, use_karras_sigmas=True),
        "dpmpp_2m": DPMSolver2M(),
        "dpmpp_2m_karras": DPMSolver2M(use_karras_sigmas=True),
        "dpmpp_2m_sde": DPMSolver2M(is_sde=True),
        "dpmpp_2m_sde_karras": DPMSolver2M(is_sde=True, use_karras_sigmas=True),
        "dpmpp_sde": DPMSolverSDE(),
        "dpmpp_sde_karras": DPMSolverSDE(use_karras_sigmas=True),
        "euler": Euler(),
        "euler_ancestral": Euler(is_ancestral=True),
        "ddim": DDIM(),
        "lcm": LCM(),
        "tcd": TCD(),
    }


def _in_part(rule: LCM, strength: float, num_inference_steps: int) -> LCM:
    """As the pipelines of consistency models have it: all steps, in a part of the schedule."""
    meant, total = _as_meant(strength), rule.original_inference_steps
    if not 0 <= strength <= 1 or int(total * meant) < min(num_inference_steps, total):
        least = num_inference_steps / total
        raise BadChoice(
            "strength",
            f"{strength:g} leaves too little for {num_inference_steps} steps, allowed are "
            f"{least:g} to 1",
        )
    return replace(rule, strength=meant)


def _flow_rules(unipc: UniPC) -> dict[str, Sampler]:
    return {"euler": Euler(), "unipc": unipc, "dpmpp_2m": DPMSolver2M()}


def _whole_table(
    name: str, rule: Sampler, schedule: Schedule, num_inference_steps: int
) -> SolverTable:
    try:
        return rule.table(schedule, num_inference_steps)
    except TooManySteps as error:
        raise BadChoice("num_inference_steps", f"{error} for {name}") from None
    except ValueError as error:
        raise BadChoice("sampler", f"{name}: {error}") from None


def _steps_between(
    timesteps: Floats,
    schedule: Schedule,
    strength: float | None,
    denoising_start: float | None,
    denoising_end: float | None,
) -> tuple[int, int]:
    """The first step of a run, and the one after its last, as diffusers' pipelines count them."""
    total = schedule.num_train_timesteps
    begin, end = 0, len(timesteps)
    if denoising_start:
        begin = _begin_after(timesteps, total, denoising_start)
    elif strength is not None:
        rounds_up = isinstance(schedule, FlowSchedule)
        begin = _begin_for(len(timesteps), strength, rounds_up=rounds_up)
    if denoising_end is not None:
        if denoising_start is not None and denoising_start >= denoising_end:
            raise BadChoice(
                "denoising_start",
                f"{denoising_start:g} is not below denoising_end, {denoising_end:g}",
            )
        end = _end_before(timesteps, total, denoising_end, begin)
    return begin, end


def _begin_for(num_steps: int, strength: float, *, rounds_up: bool) -> int:
    """The step to begin with so that a share of the steps is left."""
    if not 0 <= strength <= 1:
        raise BadChoice("strength", f"{strength:g} is out of range, allowed are 0 to 1")
    left = num_steps * _as_meant(strength)
    # diffusers' pipelines of the discrete schedules round what is left down, those of flows up.
    begin = int(num_steps - left) if rounds_up else num_steps - int(left)
    if begin == num_steps:
        least = "above 0" if rounds_up else f"{math.ceil(1000 / num_steps) / 1000:g}"
        raise BadChoice(
            "strength", f"{strength:g} leaves none of {num_steps} steps, allowed are {least} to 1"
        )
    return begin


def _begin_after(timesteps: Floats, total: int, denoising_start: float) -> int:
    """The step to begin with where a share of `total` timesteps is done."""
    if not 0 <= denoising_start < 1:
        raise BadChoice(
            "denoising_start", f"{denoising_start:g} is out of range, allowed are 0 to below 1"
        )
    begin = int((timesteps >= _cutoff(total, denoising_start)).sum())
    if begin == len(timesteps):
        most = (total - math.floor(timesteps[-1]) - 1) / total
        raise BadChoice(
            "denoising_start",
            f"{denoising_start:g} leaves none of {begin} steps, allowed are 0 to {most:g}",
        )
    return begin


def _end_before(timesteps: Floats, total: int, denoising_end: float, begin: int) -> int:
    """The step to stop before where a share of `total` timesteps is done."""
    if not 0 < denoising_end <= 1:
        raise BadChoice(
            "denoising_end", f"{denoising_end:g} is out of range, allowed are above 0 to 1"
        )
    end = int((timesteps >= _cutoff(total, denoising_end)).sum())
    if end <= begin:
        least = (total - math.floor(timesteps[begin])) / total
        raise BadChoice(
            "denoising_end",
            f"{denoising_end:g} leaves no step from step {begin + 1} of {len(timesteps)} on, "
            f"allowed are {least:g} to 1",
        )
    return end


def _cutoff(total: int, share: float) -> int:
    return round(total - _as_meant(share) * total)


def _as_meant(number: float) -> float:
    """The fraction that was meant: a request's number arrives as float32, and 0.7 as less."""
    return float(Fraction(number).limit_denominator(10_000))
