"""The samplers a request may name, each a rule that makes a coefficient table."""

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any, Protocol

from darkroom_engine.ddim import DDIM
from darkroom_engine.dpmsolver import DPMSolver2M
from darkroom_engine.euler import Euler
from darkroom_engine.lcm import LCM
from darkroom_engine.schedule import NoiseSchedule
from darkroom_engine.solver import SolverTable
from darkroom_engine.unipc import UniPC


class Sampler(Protocol):
    """A rule that makes the coefficient table of a run."""

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
            "euler": Euler(),
            "euler_ancestral": Euler(is_ancestral=True),
            "ddim": DDIM(),
            "lcm": LCM(),
        }
        # A table depends on nothing but its name and length, and takes milliseconds to compute.
        self.table = lru_cache(maxsize=1024)(self._table)

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

    def _table(self, name: str, num_inference_steps: int) -> SolverTable:
        return self._rules[name].table(self._schedule, num_inference_steps)
