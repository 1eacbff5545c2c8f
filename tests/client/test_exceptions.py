"""Each status and message of Triton has its exception, and that its place in Python's tree."""

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
from darkroom.exceptions import from_message, from_status

FULL = "the queue is full: 9 pictures are waiting, 9 may wait; retry_after_ms: 850"
HOPELESS = "timeout_ms: 500 cannot be kept, about 3200 ms of work are ahead; retry_after_ms: 2700"
EXPIRED = "timeout_ms: 50 ran out"


@pytest.mark.parametrize(
    ("statuses", "message", "expected"),
    [
        (("INVALID_ARGUMENT", "400"), "width: 3 is out of range", InvalidRequest),
        (("NOT_FOUND", "404"), "unknown model", ServerUnavailable),
        (("UNAVAILABLE", "503"), "failed to connect", ServerUnavailable),
        (("UNAVAILABLE", "503"), FULL, QueueFull),
        (("UNAVAILABLE", "503"), HOPELESS, QueueFull),
        (("UNAVAILABLE", "503"), "the queue is full", QueueFull),
        (("DEADLINE_EXCEEDED", "Deadline Exceeded", "504"), "too late", RequestTimeout),
        (("CANCELLED", "499"), "the request was cancelled", RequestCancelled),
        (("CANCELLED", "499"), EXPIRED, RequestTimeout),
        (("INTERNAL", "500"), "unet failed: out of memory", ServerError),
        # The telling words of a text count only with their own status.
        (("INTERNAL", "500"), FULL, ServerError),
        (("CANCELLED", "499"), FULL, RequestCancelled),
        (("INVALID_ARGUMENT", "400"), "timeout_ms: 0 is out of range", InvalidRequest),
        # Over HTTP, Triton has one status for errors of many kinds.
        (("400",), EXPIRED, RequestTimeout),
        (("400",), "the request was cancelled", RequestCancelled),
        (("400",), FULL, QueueFull),
        (("400",), "prompt: the request was cancelled", InvalidRequest),
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
    ("message", "expected"),
    [
        (EXPIRED, RequestTimeout),
        (FULL, QueueFull),
        (HOPELESS, QueueFull),
        ("timeout_ms: 0 is out of range, allowed are 1 to 2147483647", InvalidRequest),
        ("width: 3 is out of range", InvalidRequest),
        ("the request was cancelled", RequestCancelled),
        ("Request for unknown model: 'sdxl' is not found", ServerUnavailable),
        ("the engine is not running: no such file", ServerUnavailable),
        ("the engine stopped before the picture was done", ServerUnavailable),
        ("the server is stopping", ServerUnavailable),
        ("unet failed: out of memory", ServerError),
        ("unet: the request was cancelled", ServerError),
        ("width", ServerError),
        ("", ServerError),
    ],
)
def test_a_message_alone_tells_its_exception(message: str, expected: type[DarkroomError]) -> None:
    error = from_message(message, {"width", "timeout_ms"})

    assert type(error) is expected
    assert str(error) == message


@pytest.mark.parametrize(
    ("message", "seconds"),
    [(FULL, 0.85), (HOPELESS, 2.7), ("the queue is full", None), ("retry_after_ms: soon", None)],
)
def test_a_full_queue_tells_when_to_come_back(message: str, seconds: float | None) -> None:
    assert QueueFull(message).retry_after_s == seconds


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
    assert error.retry_after_s == 0.85
