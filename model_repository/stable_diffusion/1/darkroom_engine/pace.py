"""How long steps take on this machine, learned from those that were made."""

import threading
from collections.abc import Callable, Iterable
from math import prod
from typing import Protocol

Shape = tuple[int, int, int]

_MEMORY = 0.98
"""Of what earlier steps weigh, each new one leaves this much."""


class Work(Protocol):
    """What is left to do for one picture."""

    @property
    def latent_shape(self) -> Shape: ...
    @property
    def num_steps_left(self) -> int: ...
    @property
    def num_row_steps(self) -> int: ...


class Pace:
    """Time of a step as a + b x (rows x latent area), fitted to the steps seen lately.

    Least squares with weights that decay: a GPU has a large a, a CPU none. Before two sizes of
    batch have been seen, the time is taken to be in proportion to the size.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # Weighted sums of 1, x, x^2, t and x t, for x = rows x area and t seconds.
        self._sums = [0.0] * 5
        self._decode_s_per_area = 0.0

    def record_step(self, shape: Shape, num_rows: int, seconds: float) -> None:
        x = num_rows * _area(shape)
        with self._lock:
            terms = (1.0, x, x * x, seconds, x * seconds)
            self._sums = [
                _MEMORY * total + term for total, term in zip(self._sums, terms, strict=True)
            ]

    def record_decode(self, shape: Shape, seconds: float) -> None:
        with self._lock:
            self._decode_s_per_area = seconds / _area(shape)

    def step_s(self, shape: Shape, num_rows: int) -> float:
        """Seconds of a step of that many rows; 0 before any was seen."""
        constant, slope = self._fit()
        return constant + slope * num_rows * _area(shape)

    def seconds_for(self, work: Iterable[Work], max_rows: Callable[[Shape], int]) -> float:
        """About how long all of `work` takes, in full batches; 0 before any step was seen."""
        constant, slope = self._fit()
        row_steps: dict[Shape, int] = {}
        longest: dict[Shape, int] = {}
        for item in work:
            shape = item.latent_shape
            row_steps[shape] = row_steps.get(shape, 0) + item.num_row_steps
            longest[shape] = max(longest.get(shape, 0), item.num_steps_left)
        seconds = 0.0
        for shape, total in row_steps.items():
            # Not fewer steps than the longest has, nor more rows a step than are allowed.
            num_steps = max(longest[shape], -(-total // max_rows(shape)))
            seconds += constant * num_steps + slope * total * _area(shape)
            # Decoding goes on beside the steps, but the last picture's comes after them.
            seconds += self._decode_s_per_area * _area(shape)
        return seconds

    def _fit(self) -> tuple[float, float]:
        with self._lock:
            n, x, xx, t, xt = self._sums
        if n == 0:
            return 0.0, 0.0
        spread = n * xx - x * x
        # Sizes so near each other that their times differ by chance.
        if spread <= 0.01 * x * x:
            return 0.0, t / x
        slope = (n * xt - x * t) / spread
        constant = (t - slope * x) / n
        if slope < 0:
            return t / n, 0.0
        if constant < 0:
            return 0.0, xt / xx
        return constant, slope


def _area(shape: Shape) -> int:
    return prod(shape[1:])
