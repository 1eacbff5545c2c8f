"""What a benchmark records, and the numbers that follow from it: no clocks and no servers here."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

PERCENTILES = (50, 90, 95, 99)


@dataclass(frozen=True)
class Answer:
    """One request's way: time stamps in seconds on one clock, and the server's own account."""

    sent_s: float
    answered_s: float
    timings: dict[str, float]
    """queue_ms, denoise_ms, decode_ms and total_ms, as the server measured them."""
    queue_steps: int = 0
    """Steps of others that began between the arrival and the first step, as the server counted."""

    @property
    def latency_ms(self) -> float:
        return 1000 * (self.answered_s - self.sent_s)

    def since(self, start_s: float) -> dict[str, float]:
        """The record for a result file, with time stamps counted from `start_s`."""
        return {
            "sent_s": round(self.sent_s - start_s, 6),
            "answered_s": round(self.answered_s - start_s, 6),
            "queue_steps": self.queue_steps,
            **self.timings,
        }


@dataclass(frozen=True)
class Round:
    """Some requests, sent one after the other or all at once."""

    answers: list[Answer]

    @property
    def start_s(self) -> float:
        return min(answer.sent_s for answer in self.answers)

    @property
    def wall_s(self) -> float:
        """From the first request sent to the last answer."""
        return max(answer.answered_s for answer in self.answers) - self.start_s

    @property
    def pictures_per_s(self) -> float:
        return len(self.answers) / self.wall_s

    def latency_ms(self) -> dict[str, float]:
        """Percentiles of the time between sending a request and its answer."""
        return percentiles([answer.latency_ms for answer in self.answers])

    def wait_ms(self) -> dict[str, float]:
        """Percentiles of the time from the start of the round to an answer.

        This is the latency of users who all ask at the start; requests sent one after the other
        are then a queue, whose waiting time counts.
        """
        return percentiles([1000 * (answer.answered_s - self.start_s) for answer in self.answers])

    def result(self) -> dict[str, Any]:
        """All of it, for a result file."""
        return {
            "wall_s": round(self.wall_s, 4),
            "pictures_per_s": round(self.pictures_per_s, 3),
            "wait_ms": self.wait_ms(),
            "latency_ms": self.latency_ms(),
            "answers": [answer.since(self.start_s) for answer in self.answers],
        }


@dataclass(frozen=True)
class Join:
    """A short request that arrived while a long one was running."""

    long: Answer
    short: Answer
    long_steps: int
    """The step count of the long request."""

    @property
    def is_overlapping(self) -> bool:
        """Whether the long request was sent before the short one and answered after it."""
        is_later = self.short.sent_s > self.long.sent_s
        return is_later and self.short.answered_s < self.long.answered_s

    @property
    def step_ms(self) -> float:
        """Mean time of a step of the running batch."""
        return self.long.timings["denoise_ms"] / self.long_steps

    @property
    def delay_steps(self) -> float:
        """The short request's time in the queue, in steps of the running batch."""
        return self.short.timings["queue_ms"] / self.step_ms


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Percentiles by linear interpolation, as {"p50": ...}."""
    return {f"p{rank}": round(float(np.percentile(values, rank)), 3) for rank in PERCENTILES}


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Text in columns: the first one is aligned left, all others right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if n else cell.ljust(width)
            for n, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (header, ["-" * width for width in widths], *rows)
    )
