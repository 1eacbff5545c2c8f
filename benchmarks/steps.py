"""When the steps of a running request came, by what went on beside it: no clocks here."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SETTLING_STEPS = 3
"""Steps after a change that belong to neither side of it."""


@dataclass(frozen=True)
class Phase:
    """Neighbouring steps of one request, during which the other rows did the same."""

    arrived_s: list[float]
    """When each step was told to the client; the first one only begins the phase."""

    @property
    def step_ms(self) -> list[float]:
        return [1000 * float(gap) for gap in np.diff(self.arrived_s)]

    @property
    def wall_s(self) -> float:
        return self.arrived_s[-1] - self.arrived_s[0]

    @property
    def num_steps(self) -> int:
        return len(self.arrived_s) - 1

    @property
    def mean_ms(self) -> float:
        return 1000 * self.wall_s / self.num_steps

    def holds(self, at_s: float) -> bool:
        return self.arrived_s[0] <= at_s <= self.arrived_s[-1]


def split(arrived_s: Sequence[float], boundaries: Sequence[int]) -> list[Phase]:
    """The phases between `boundaries`, counted in steps, without those in which all settles.

    Raises:
        ValueError: a phase has no steps.
    """
    phases = []
    for begin, end in itertools.pairwise(boundaries):
        stamps = list(arrived_s[begin + SETTLING_STEPS : end])
        if len(stamps) < 2:
            raise ValueError(f"steps {begin} to {end} are too few")
        phases.append(Phase(stamps))
    return phases


def same_rows_ms(alone_ms: float, full_ms: float, extra_rows: int, rows_per_step: float) -> float:
    """What a step takes with so many more rows at a mean, if nothing but rows costs time.

    Args:
        alone_ms: a step without further rows.
        full_ms: a step with `extra_rows` more.
        rows_per_step: how many more there were at a mean, 0 to `extra_rows`.
    """
    return alone_ms + (full_ms - alone_ms) * rows_per_step / extra_rows
