"""The numbers that follow from what was measured: no clocks, no devices."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

SLO_FACTOR = 3.0
"""A request is in time if it takes no longer than so many times what it takes alone."""


def spread(values: Sequence[float], digits: int = 3) -> dict[str, Any]:
    """Median, least and largest, and how many there are."""
    return {
        "median": round(statistics.median(values), digits),
        "min": round(min(values), digits),
        "max": round(max(values), digits),
        "count": len(values),
    }


def psnr(pictures: NDArray[Any], reference: NDArray[Any], peak: float) -> float | None:
    """Peak signal-to-noise ratio in dB, None for equal arrays; NaN if one has no finite numbers."""
    difference = pictures.astype(np.float64) - reference.astype(np.float64)
    error = float(np.mean(difference**2))
    if error == 0:
        return None
    return round(10 * math.log10(peak**2 / error), 2)


def compare_latents(latents: NDArray[Any], reference: NDArray[Any]) -> dict[str, float | None]:
    """How far latents are from others: the peak is the range of the reference."""
    peak = float(reference.max() - reference.min())
    return {
        "max_abs": round(float(np.abs(latents - reference).max()), 6),
        "range": round(peak, 4),
        "psnr_db": psnr(latents, reference, peak),
    }


def compare_pictures(levels: NDArray[Any], reference: NDArray[Any]) -> dict[str, float | None]:
    """How far pictures of 8 bits are from others."""
    difference = np.abs(levels.astype(np.int16) - reference.astype(np.int16))
    return {
        "max_levels": float(difference.max()),
        "psnr_db": psnr(levels, reference, 255.0),
    }


@dataclass(frozen=True)
class Solo:
    """What requests take on an idle engine, by their steps: a line through two measured ones."""

    short_steps: int
    long_steps: int
    short_s: Mapping[bool, float]
    """By whether the request is guided."""
    long_s: Mapping[bool, float]

    def seconds(self, num_steps: int, *, is_guided: bool) -> float:
        """The time of a request with so many steps, alone."""
        short, long = self.short_s[is_guided], self.long_s[is_guided]
        slope = (long - short) / (self.long_steps - self.short_steps)
        return short + slope * (num_steps - self.short_steps)


@dataclass(frozen=True)
class Visit:
    """A request of a load: when it came and when its picture did, in seconds from the start."""

    arrived_s: float
    answered_s: float | None
    """None if it was given up at the end."""
    num_steps: int
    is_guided: bool

    def record(self) -> list[Any]:
        """Its numbers, in the order of `VISIT`."""
        answered = None if self.answered_s is None else round(self.answered_s, 4)
        return [round(self.arrived_s, 4), answered, self.num_steps, self.is_guided]


VISIT = ("arrived_s", "answered_s", "num_steps", "is_guided")


def describe_load(
    visits: Sequence[Visit],
    *,
    end_s: float,
    window_s: float,
    solo_s: Callable[[Visit], float],
) -> dict[str, Any]:
    """What became of the requests of a load.

    Args:
        end_s: when those without an answer were given up: they took at least until then.
        window_s: during which requests came.
        solo_s: what a request takes alone.
    """
    latencies = [
        (end_s if visit.answered_s is None else visit.answered_s) - visit.arrived_s
        for visit in visits
    ]
    answered = [visit.answered_s for visit in visits if visit.answered_s is not None]
    in_time = [
        visit
        for visit, latency in zip(visits, latencies, strict=True)
        if visit.answered_s is not None and latency <= SLO_FACTOR * solo_s(visit)
    ]
    return {
        "num_requests": len(visits),
        "num_unfinished": len(visits) - len(answered),
        "offered_per_s": round(len(visits) / window_s, 3),
        "latency_s": {
            f"p{rank}": round(float(np.percentile(latencies, rank)), 4) for rank in (50, 95, 99)
        },
        "mean_latency_s": round(statistics.fmean(latencies), 4),
        "share_in_time": round(len(in_time) / len(visits), 4),
        "goodput_per_s": round(len(in_time) / window_s, 3),
        "visits": [visit.record() for visit in visits],
    }


def steady_rate(answered_s: Sequence[float], start_s: float, end_s: float) -> float | None:
    """Answers per second between two moments; None if there were fewer than two.

    From the first answer to the last: the time before and after belongs to answers outside.
    """
    inside = sorted(at for at in answered_s if start_s <= at <= end_s)
    if len(inside) < 2 or inside[-1] == inside[0]:
        return None
    return (len(inside) - 1) / (inside[-1] - inside[0])
