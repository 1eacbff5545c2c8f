"""Each status of Triton has its exception, and each exception its place in Python's tree."""

import pickle

import pytest

import darkroom
from darkroom import (
    DarkroomError,
    InvalidRequest,
    QueueFull,
    RequestCancelled,
    RequestTimeout,
    ServerError,
    ServerUnavailable,
)
from darkroom.exceptions import from_status

FULL = "the queue is full: 9 pictures are waiting, 9 may wait; try again later"
EXPIRED = "timeout_ms: 50 ran out"


@pytest.mark.parametrize(
    ("statuses", "message", "expected"),
    [
        (("INVALID_ARGUMENT", "400"), "width: 3 is out of range", InvalidRequest),
        (("NOT_FOUND", "404"), "unknown model", ServerUnavailable),
        (("UNAVAILABLE", "503"), "failed to connect", ServerUnavailable),
        (("UNAVAILABLE", "503"), FULL, QueueFull),
        (("DEADLINE_EXCEEDED", "Deadline Exceeded", "504"), "too late", RequestTimeout),
        (("CANCELLED", "499"), "the request was cancelled", RequestCancelled),
        (("CANCELLED", "499"), EXPIRED, RequestTimeout),
        (("INTERNAL", "500"), "unet failed: out of memory", ServerError),
        # The telling words of a text count only with their own status.
        (("INTERNAL", "500"), FULL, ServerError),
        (("INVALID_ARGUMENT", "400"), "timeout_ms: 0 is out of range", InvalidRequest),
        (("DATA_LOSS", "418", "", "no status at all"), "whatever", ServerError),
    ],
)
def test_status_to_exception(
    statuses: tuple[str, ...], message: str, expected: type[DarkroomError]
) -> None:
    for status in statuses:
        for written in (status, f"StatusCode.{status}"):
            error = from_status(written, message)

            assert type(error) is expected
            assert str(error) == message


def test_no_status_is_a_server_error() -> None:
    assert type(from_status(None, "whatever")) is ServerError


@pytest.mark.parametrize(
    ("error", "builtin"),
    [
        (InvalidRequest, ValueError),
        (RequestTimeout, TimeoutError),
        (ServerUnavailable, ConnectionError),
    ],
)
def test_errors_are_what_python_calls_them(error: type[Exception], builtin: type) -> None:
    assert issubclass(error, builtin)


def test_all_errors_of_the_package_are_darkroom_errors() -> None:
    public = [getattr(darkroom, name) for name in darkroom.__all__]
    errors = [it for it in public if isinstance(it, type) and issubclass(it, Exception)]

    assert len(errors) == 7
    assert all(issubclass(error, DarkroomError) for error in errors)


def test_retrying_helps_where_the_server_was_busy_or_away() -> None:
    kinds = DarkroomError.__subclasses__()
    ours = [kind for kind in kinds if kind.__module__ == DarkroomError.__module__]

    assert {kind for kind in ours if kind.is_retryable} == {QueueFull, ServerUnavailable}


def test_errors_survive_pickling() -> None:
    error = pickle.loads(pickle.dumps(QueueFull(FULL)))  # noqa: S301  of our own

    assert type(error) is QueueFull
    assert str(error) == FULL
