"""What can go wrong, from the caller's side.

* DarkroomError
  x InvalidRequest      a field is malformed or out of range; also a ValueError
  x QueueFull           the server has too much to do; retrying after `retry_after_s` helps
  x RequestTimeout      the answer did not come in time; also a TimeoutError
  x RequestCancelled    the request was cancelled
  x ServerUnavailable   no server answers at the address; also a ConnectionError
  x ServerError         the server failed at a valid request
"""

import re
from collections.abc import Container

_RETRY_AFTER = re.compile(r"\bretry_after_ms: (\d+)")


class DarkroomError(Exception):
    """Any failure of a request. `is_retryable` tells whether the same request may succeed later."""

    is_retryable = False


class InvalidRequest(DarkroomError, ValueError):
    """The request names a field, value or model that the server does not accept."""


class QueueFull(DarkroomError):
    """The server's waiting queue is full, or too long to keep the request's `timeout_ms`."""

    is_retryable = True

    @property
    def retry_after_s(self) -> float | None:
        """Seconds after which the server expects to have room; None if it does not say."""
        match = _RETRY_AFTER.search(str(self))
        return int(match[1]) / 1000 if match else None


class RequestTimeout(DarkroomError, TimeoutError):
    """The client's `timeout`, or the request's `timeout_ms`, ran out."""


class RequestCancelled(DarkroomError):
    """The request was cancelled before it was answered."""


class ServerUnavailable(DarkroomError, ConnectionError):
    """The server cannot be reached, or does not serve the model."""

    is_retryable = True


class ServerError(DarkroomError):
    """The server failed; its log knows more."""


def from_status(status: str | None, message: str) -> DarkroomError:
    """The error for a status of Triton: a gRPC code's name, or an HTTP status as text."""
    code = (status or "").removeprefix("StatusCode.")
    if code == "400":
        # Over HTTP, Triton makes this of a model's CANCELLED too, and of every error of a model
        # that it generates from.
        code = _told_status(message) or code
    # Triton has one code for both of these pairs, so that the text must tell them apart.
    if code in ("UNAVAILABLE", "503") and (
        "queue is full" in message or _RETRY_AFTER.search(message)
    ):
        return QueueFull(message)
    if code in ("CANCELLED", "499") and "timeout_ms" in message:
        return RequestTimeout(message)
    return _ERRORS.get(code, ServerError)(message)


def from_message(message: str, fields: Container[str]) -> DarkroomError:
    """The error for a message that came without its status, as errors do in Triton's streams.

    Args:
        fields: the names of the inputs; a message that begins with one is about that field.
    """
    status = _told_status(message)
    if status:
        return from_status(status, message)
    field, colon, _ = message.partition(":")
    return InvalidRequest(message) if colon and field in fields else ServerError(message)


def _told_status(message: str) -> str | None:
    """The status that a message of ours was sent with, where its text tells."""
    return next((status for pattern, status in _TELLING if pattern.search(message)), None)


_ERRORS: dict[str, type[DarkroomError]] = {
    "INVALID_ARGUMENT": InvalidRequest,
    "400": InvalidRequest,
    "NOT_FOUND": ServerUnavailable,
    "404": ServerUnavailable,
    "UNAVAILABLE": ServerUnavailable,
    "503": ServerUnavailable,
    "DEADLINE_EXCEEDED": RequestTimeout,
    "Deadline Exceeded": RequestTimeout,
    "504": RequestTimeout,
    "CANCELLED": RequestCancelled,
    "499": RequestCancelled,
}

# In this order: what is said of timeout_ms is not always that its value is wrong.
_TELLING = (
    (re.compile(r"^timeout_ms: \d+ ran out"), "CANCELLED"),
    (_RETRY_AFTER, "UNAVAILABLE"),
    (re.compile(r"^Request for unknown model"), "NOT_FOUND"),
    (re.compile(r"^the (engine|server) (is not running|is stopping|stopped)"), "UNAVAILABLE"),
    (re.compile(r"^the request was cancelled"), "CANCELLED"),
)
