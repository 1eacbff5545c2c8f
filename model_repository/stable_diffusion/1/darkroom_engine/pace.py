"""How long steps take on this machine, learned from those that were made."""

import threading
from math import prod

from darkroom_engine.networks import Shape

_MEMORY = 0.98
"""Of what earlier steps weigh, each new one leaves this much."""
_OUTLIER = 4.0
"""A time counts as this many times the expected one at the most."""


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
        expected = self.step_s(shape, num_rows)
        if expected:
            # One that took so long because the machine was held up is no measure.
            seconds = min(seconds, _OUTLIER * expected)
        with self._lock:
            terms = (1.0, x, x * x, seconds, x * seconds)
            self._sums = [
                _MEMORY * total + term for total, term in zip(self._sums, terms, strict=True)
            ]

    def record_decode(self, shape: Shape, seconds: float) -> None:
        per_area = seconds / _area(shape)
        with self._lock:
            known = self._decode_s_per_area or per_area
            self._decode_s_per_area = known + (min(per_area, _OUTLIER * known) - known) / 4

    def step_s(self, shape: Shape, num_rows: int) -> float:
        """Seconds of a step of that many rows; 0 before any was seen."""
        return self.steps_s(shape, 1, num_rows)

    def steps_s(self, shape: Shape, num_steps: float, num_row_steps: float) -> float:
        """Seconds of that many steps with that many rows in all; 0 before any was seen."""
        constant, slope = self._fit()
        return constant * num_steps + slope * num_row_steps * _area(shape)

    def decode_s(self, shape: Shape) -> float:
        """Seconds of decoding a picture; 0 before any was."""
        return self._decode_s_per_area * _area(shape)

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
