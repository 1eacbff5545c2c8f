"""The samplers a request may name, each a rule that makes a coefficient table."""

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any, Protocol

from darkroom_engine.ddim import DDIM
from darkroom_engine.dpmsolver import DPMSolver2M, DPMSolverSDE
from darkroom_engine.euler import Euler
from darkroom_engine.lcm import LCM
from darkroom_engine.schedule import TIMESTEP_SPACINGS, NoiseSchedule, TooManySteps
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

    def table(self, schedule: NoiseSchedule, num_inference_steps: int) -> SolverTable:
        """The table of that many steps; ValueError if the rule cannot do that many."""


class Samplers:
    """The samplers of one checkpoint, by name; tables are computed once and kept."""

    def __init__(self, schedule: NoiseSchedule, unipc: UniPC) -> None:
        self._schedule = schedule
        self._rules: dict[str, Sampler] = {
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
        # A table depends on nothing but what was chosen, and takes milliseconds to compute.
        self._kept_table = lru_cache(maxsize=1024)(self._table)

    @classmethod
    def from_config(
        cls, noise_schedule: Mapping[str, Any], solver: Mapping[str, Any]
    ) -> "Samplers":
        """Read the manifest's `noise_schedule` and `solver`."""
        options = dict(solver)
        options["disable_corrector"] = tuple(options.get("disable_corrector", ()))
        return cls(NoiseSchedule.from_config(noise_schedule), UniPC(**options))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._rules)

    def table(
        self,
        name: str,
        num_inference_steps: int,
        eta: float | None = None,
        timestep_spacing: str | None = None,
    ) -> SolverTable:
        """The table of that many steps of a sampler.

        Args:
            name: one of `names`.
            num_inference_steps: 1 or more.
            eta: 0 to 1, how much noise the steps of `ddim` and `tcd` add; None is the sampler's
                default, which is diffusers'.
            timestep_spacing: one of TIMESTEP_SPACINGS; None is the checkpoint's own.

        Raises:
            BadChoice: there is no such table.
        """
        return self._kept_table(name, num_inference_steps, eta, timestep_spacing)

    def _table(
        self, name: str, num_inference_steps: int, eta: float | None, timestep_spacing: str | None
    ) -> SolverTable:
        if name not in self._rules:
            raise BadChoice(
                "sampler", f"{name!r} does not exist, there are {', '.join(self.names)}"
            )
        rule = self._rules[name] if eta is None else self._with_eta(name, eta)
        schedule = (
            self._schedule if timestep_spacing is None else self._spaced(name, timestep_spacing)
        )
        try:
            return rule.table(schedule, num_inference_steps)
        except TooManySteps as error:
            raise BadChoice("num_inference_steps", f"{error} for {name}") from None
        except ValueError as error:
            raise BadChoice("sampler", f"{name}: {error}") from None

    def _with_eta(self, name: str, eta: float) -> Sampler:
        rule = self._rules[name]
        if not isinstance(rule, DDIM | TCD):
            takers = [name for name, rule in self._rules.items() if isinstance(rule, DDIM | TCD)]
            raise BadChoice("eta", f"only {' and '.join(takers)} take it, not {name}")
        if not 0 <= eta <= 1:
            raise BadChoice("eta", f"{eta:g} is out of range, allowed are 0 to 1")
        return replace(rule, eta=eta)

    def _spaced(self, name: str, timestep_spacing: str) -> NoiseSchedule:
        if timestep_spacing not in TIMESTEP_SPACINGS:
            raise BadChoice(
                "timestep_spacing",
                f"{timestep_spacing!r} does not exist, there are {', '.join(TIMESTEP_SPACINGS)}",
            )
        if self._rules[name].has_own_timesteps:
            raise BadChoice("timestep_spacing", f"{name} has timesteps of its own")
        return replace(self._schedule, timestep_spacing=timestep_spacing)
