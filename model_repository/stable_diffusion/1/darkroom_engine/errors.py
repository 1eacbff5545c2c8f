"""What a request can end in when it does not end in a picture.

* EngineError
  x InvalidRequest      the caller's mistake; names the field, the value and the allowed range
  x Overloaded          the queue is full; trying again later may work
  x DeadlineExceeded    the request's own `timeout_ms` ran out
  x Cancelled           the caller left or asked to stop
  x NetworkFailed       a network raised, or returned something that is not a finite number
"""

from typing import ClassVar


class EngineError(Exception):
    """An answer that is not a picture. `code` is the name of Triton's error code for it."""

    code: ClassVar[str] = "INTERNAL"


class InvalidRequest(EngineError):
    """A field of the request is missing, malformed or out of range."""

    code = "INVALID_ARG"

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field


class Overloaded(EngineError):
    """The waiting queue is full."""

    code = "UNAVAILABLE"


class DeadlineExceeded(EngineError):
    """The request's deadline passed while it waited or ran."""

    # Triton has no deadline code for backends; CANCELLED is the one that clients do not retry.
    code = "CANCELLED"


class Cancelled(EngineError):
    """The caller cancelled the request."""

    code = "CANCELLED"


class NetworkFailed(EngineError):
    """A network could not be run, or its output is unusable."""

    code = "INTERNAL"

    def __init__(self, network: str, problem: str) -> None:
        super().__init__(f"{network} failed: {problem}")
        self.network = network
