"""Request-level batching: equal requests run together from their first step to their last.

The rule alone, which has no clock: who runs it says what time it is.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from benchmarks.workload import Request


class Kind(NamedTuple):
    """What requests must have in common to run together."""

    num_steps: int
    is_guided: bool


def is_guided(request: Request) -> bool:
    """Whether it takes two rows a step, as those do that leave it to the checkpoint."""
    return request.guidance_scale is None or request.guidance_scale > 1


def kind_of(request: Request) -> Kind:
    return Kind(request.num_inference_steps, is_guided(request))


class Waiting(NamedTuple):
    """A request in the queue, and since when."""

    request: Request
    since_s: float


@dataclass(frozen=True)
class Grouping:
    """Which requests of a queue run next, on a machine that has just become free."""

    max_rows: int
    window_s: float
    """How long the oldest request waits for equals."""
    max_pictures: int | None = None
    """1 serves one request at a time."""

    def next_group(self, queue: Sequence[Waiting], now_s: float) -> list[Waiting]:
        """The oldest request with all its equals, as many as there are rows; [] to go on waiting.

        Args:
            queue: in order of arrival.
        """
        if not queue:
            return []
        kind = kind_of(queue[0].request)
        size = self.capacity(kind)
        group = [waiting for waiting in queue if kind_of(waiting.request) == kind][:size]
        is_due = now_s - queue[0].since_s >= self.window_s
        return group if is_due or len(group) == size else []

    def wait_s(self, queue: Sequence[Waiting], now_s: float) -> float | None:
        """How long until the oldest has waited enough; None if the queue is empty."""
        return max(0.0, queue[0].since_s + self.window_s - now_s) if queue else None

    def capacity(self, kind: Kind) -> int:
        """Pictures of a kind that fit into a group."""
        fitting = max(1, self.max_rows // (2 if kind.is_guided else 1))
        return fitting if self.max_pictures is None else min(fitting, self.max_pictures)
