"""What a request can end in when it does not end in a picture.

* EngineError
  x InvalidRequest      the caller's mistake; names the field, the value and the allowed range
  x Overloaded          there is too much to do; trying again later may work
  x DeadlineExceeded    the request's own `timeout_ms` ran out
  x Cancelled           the caller left or asked to stop
  x NetworkFailed       a network raised, or returned something that is not a finite number
"""

from typing import ClassVar


class EngineError(Exception):
    """An answer that is not a picture."""

    code: ClassVar[str] = "INTERNAL"
    """The name of Triton's error code for it."""
    outcome: ClassVar[str] = "error"
    """What it counts as in the metrics."""


class InvalidRequest(EngineError):
    """A field of the request is missing, malformed or out of range."""

    code = "INVALID_ARG"
    outcome = "invalid"

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field


class Overloaded(EngineError):
    """The waiting queue is full, or would not let the request be in time.

    `retry_after_s` is about how long it takes until there is room, in seconds.
    """

    code = "UNAVAILABLE"
    outcome = "rejected"

    def __init__(self, problem: str, retry_after_s: float) -> None:
        super().__init__(f"{problem}; retry_after_ms: {max(1, round(1000 * retry_after_s))}")
        self.retry_after_s = retry_after_s


class DeadlineExceeded(EngineError):
    """The request's deadline passed while it waited or ran."""

    # Triton has no deadline code for backends; CANCELLED is the one that clients do not retry.
    code = "CANCELLED"
    outcome = "expired"


class Cancelled(EngineError):
    """The caller cancelled the request."""

    code = "CANCELLED"
    outcome = "cancelled"


class NetworkFailed(EngineError):
    """A network could not be run, or its output is unusable."""

    code = "INTERNAL"

    def __init__(self, network: str, problem: str, *, is_final: bool = False) -> None:
        """Name a network and what is wrong with it.

        Args:
            is_final: whether the network will not be there again, and waiting is in vain.
        """
        super().__init__(f"{network} failed: {problem}")
        self.network = network
        self.is_final = is_final


class NotYetAllowed(NetworkFailed):
    """Networks cannot be called yet, because the model that calls them is still being loaded."""
