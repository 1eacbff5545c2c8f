"""What can go wrong, from the caller's side.

* DarkroomError
  x InvalidRequest      a field is malformed or out of range; also a ValueError
  x QueueFull           the server refused the request because too many wait; retrying later helps
  x RequestTimeout      the answer did not come in time; also a TimeoutError
  x RequestCancelled    the request was cancelled
  x ServerUnavailable   no server answers at the address; also a ConnectionError
  x ServerError         the server failed at a valid request
"""


class DarkroomError(Exception):
    """Any failure of a request. `is_retryable` tells whether the same request may succeed later."""

    is_retryable = False


class InvalidRequest(DarkroomError, ValueError):
    """The request names a field, value or model that the server does not accept."""


class QueueFull(DarkroomError):
    """The server's waiting queue is full."""

    is_retryable = True


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
    # Triton has one code for both of these pairs, so that the text must tell them apart.
    if code in ("UNAVAILABLE", "503") and "queue is full" in message:
        return QueueFull(message)
    if code in ("CANCELLED", "499") and "timeout_ms" in message:
        return RequestTimeout(message)
    return _ERRORS.get(code, ServerError)(message)


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
