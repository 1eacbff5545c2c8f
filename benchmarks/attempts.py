"""Requests that may be refused, and what became of them: no clocks and no servers here."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from darkroom import (
    DarkroomError,
    InvalidRequest,
    QueueFull,
    RequestCancelled,
    RequestTimeout,
    ServerError,
)

IMAGE = "image"
INVALID = "invalid"
REJECTED = "rejected"
EXPIRED = "expired"
CANCELLED = "cancelled"
ERROR = "error"
UNANSWERED = "unanswered"
"""The client had to give up, or the connection broke: no server counts this."""


def outcome_of(error: DarkroomError) -> str:
    """What the server counts a failure as, by the names of darkroom_requests_total."""
    # The client's own patience and the request's make the same error.
    if isinstance(error, RequestTimeout) and "timeout_ms" not in str(error):
        return UNANSWERED
    kinds = {
        InvalidRequest: INVALID,
        QueueFull: REJECTED,
        RequestTimeout: EXPIRED,
        RequestCancelled: CANCELLED,
        ServerError: ERROR,
    }
    return next((name for kind, name in kinds.items() if isinstance(error, kind)), UNANSWERED)


@dataclass(frozen=True)
class Attempt:
    """One request's way; time stamps in seconds on one clock."""

    due_s: float
    """When it was to be sent."""
    sent_s: float
    answered_s: float
    num_steps: int
    timeout_ms: int | None
    outcome: str
    retry_after_ms: int | None = None
    is_queue_full: bool = False
    """Of a rejected one: for want of a place, rather than of time."""

    @property
    def latency_ms(self) -> float:
        return 1000 * (self.answered_s - self.sent_s)

    def since(self, start_s: float) -> list[Any]:
        """The record for a result file, in the order of `RECORD`."""
        fields = asdict(self)
        for name in ("due_s", "sent_s", "answered_s"):
            fields[name] = round(fields[name] - start_s, 4)
        return [fields[name] for name in RECORD]


RECORD = (
    *("due_s", "sent_s", "answered_s", "num_steps", "timeout_ms"),
    *("outcome", "retry_after_ms", "is_queue_full"),
)


@dataclass(frozen=True)
class Load:
    """Attempts, of which those count that end between two moments: the load is steady then."""

    attempts: list[Attempt]
    start_s: float
    end_s: float

    @property
    def seconds(self) -> float:
        return self.end_s - self.start_s

    def having(self, *outcomes: str) -> list[Attempt]:
        """All attempts with these outcomes."""
        return [attempt for attempt in self.attempts if attempt.outcome in outcomes]

    @property
    def pictures(self) -> list[Attempt]:
        """Those that became a picture within the time."""
        return [it for it in self.having(IMAGE) if self.start_s <= it.answered_s <= self.end_s]

    @property
    def pictures_per_s(self) -> float:
        return len(self.pictures) / self.seconds

    @property
    def steps_per_s(self) -> float:
        """Steps of what became a picture."""
        return sum(attempt.num_steps for attempt in self.pictures) / self.seconds

    @property
    def offered_per_s(self) -> float:
        """Requests per second that were sent within the time."""
        sent = [it for it in self.attempts if self.start_s <= it.sent_s <= self.end_s]
        return len(sent) / self.seconds

    @property
    def share_in_time(self) -> float | None:
        """Of those accepted with a deadline, the share that became a picture before it."""
        accepted = [it for it in self.having(IMAGE, EXPIRED) if it.timeout_ms is not None]
        in_time = [it for it in accepted if it.outcome == IMAGE]
        return len(in_time) / len(accepted) if accepted else None


def counts(attempts: Sequence[Attempt]) -> dict[str, int]:
    """How many attempts had each outcome."""
    outcomes = [attempt.outcome for attempt in attempts]
    return {name: outcomes.count(name) for name in sorted(set(outcomes))}
