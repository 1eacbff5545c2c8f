"""How long requests would wait on a server that does not share its steps: a model of one."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Arrival:
    """A request of one row."""

    at_s: float
    num_steps: int


def first_come_first_served(
    arrivals: Sequence[Arrival], max_rows: int, step_s: float
) -> list[float]:
    """When each would start, in seconds: who has a row keeps it to the end, all others queue.

    Every step takes `step_s`, however many rows it has. That is true of this benchmark's, whose
    rows are always full.
    """
    free_at = [0.0] * max_rows
    starts = [0.0] * len(arrivals)
    for number in sorted(range(len(arrivals)), key=lambda n: arrivals[n].at_s):
        row = min(range(max_rows), key=free_at.__getitem__)
        starts[number] = max(arrivals[number].at_s, free_at[row])
        free_at[row] = starts[number] + arrivals[number].num_steps * step_s
    return starts
