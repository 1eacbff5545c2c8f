import pytest

from benchmarks.attempts import (
    CANCELLED,
    ERROR,
    EXPIRED,
    IMAGE,
    INVALID,
    RECORD,
    REJECTED,
    UNANSWERED,
    Attempt,
    Load,
    counts,
    outcome_of,
)
from darkroom import (
    InvalidRequest,
    QueueFull,
    RequestCancelled,
    RequestTimeout,
    ServerError,
    ServerUnavailable,
)


def attempt(
    sent: float,
    answered: float,
    outcome: str = IMAGE,
    *,
    steps: int = 10,
    timeout_ms: int | None = None,
) -> Attempt:
    return Attempt(sent, sent, answered, steps, timeout_ms, outcome)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (InvalidRequest("seed: -1 is out of range"), INVALID),
        (QueueFull("the queue is full"), REJECTED),
        (RequestTimeout("timeout_ms: 5 ran out"), EXPIRED),
        (RequestTimeout("no answer within 120 s"), UNANSWERED),
        (RequestCancelled("the request was cancelled"), CANCELLED),
        (ServerError("unet failed"), ERROR),
        (ServerUnavailable("connection refused"), UNANSWERED),
    ],
)
def test_an_error_has_the_outcome_that_the_server_counts_it_as(error, expected):
    assert outcome_of(error) == expected


def test_only_pictures_within_the_steady_time_count():
    load = Load([attempt(0, 1), attempt(1, 3), attempt(2, 5), attempt(4, 9)], 2.0, 6.0)

    assert load.seconds == 4.0
    assert load.pictures_per_s == 0.5
    assert load.steps_per_s == 5.0
    assert load.offered_per_s == 0.5


def test_what_is_refused_or_expires_is_no_picture():
    load = Load([attempt(0, 1), attempt(0, 1, REJECTED), attempt(0, 1, EXPIRED)], 0.0, 1.0)

    assert load.pictures_per_s == 1.0
    assert len(load.having(REJECTED, EXPIRED)) == 2


def test_only_accepted_requests_with_a_deadline_can_keep_it():
    load = Load(
        [
            attempt(0, 1),
            attempt(0, 1, timeout_ms=2000),
            attempt(0, 1, timeout_ms=3000),
            attempt(0, 1, timeout_ms=2000),
            attempt(0, 2, EXPIRED, timeout_ms=2000),
            attempt(0, 0, REJECTED, timeout_ms=10),
        ],
        0.0,
        1.0,
    )

    assert load.share_in_time == 0.75


def test_without_deadlines_there_is_no_share_that_kept_them():
    assert Load([attempt(0, 1)], 0.0, 1.0).share_in_time is None


def test_the_record_of_an_attempt_counts_from_the_start_of_the_load():
    record = Attempt(10.0, 10.25, 11.0, 4, 500, REJECTED, 30, is_queue_full=True).since(8.0)

    assert dict(zip(RECORD, record, strict=True)) == {
        "due_s": 2.0,
        "sent_s": 2.25,
        "answered_s": 3.0,
        "num_steps": 4,
        "timeout_ms": 500,
        "outcome": REJECTED,
        "retry_after_ms": 30,
        "is_queue_full": True,
    }


def test_outcomes_are_counted_by_name():
    attempts = [attempt(0, 1, REJECTED), attempt(0, 1), attempt(0, 1, REJECTED)]

    assert counts(attempts) == {IMAGE: 1, REJECTED: 2}
