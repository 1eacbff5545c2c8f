"""What requests come in by: the face that an engine and a fleet of engines have in common."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping

from darkroom_engine.errors import EngineError, InvalidRequest
from darkroom_engine.job import Job, Listener, Reply
from darkroom_engine.reader import Field
from darkroom_engine.request import ImageRequest, Limits
from darkroom_engine.watcher import IsAbandoned

logger = logging.getLogger(__name__)


def never() -> bool:
    return False


class Intake(ABC):
    """Takes requests, and answers each exactly once. Any thread may call it."""

    limits: Limits

    def ask(
        self,
        fields: Mapping[str, Field],
        reply: Reply,
        *,
        request_id: str = "",
        is_abandoned: IsAbandoned = never,
        listener: Listener | None = None,
    ) -> None:
        """Parse and queue a request, or answer at once why not; never raises.

        Args:
            fields: raw values by name, see `ImageRequest.parse`.
            reply: called exactly once, from any thread; from the listener's if there is one.
            is_abandoned: asked now and then whether the caller has left, which cancels the request.
            listener: is told of every step.
        """
        try:
            request = ImageRequest.parse(fields, self.limits)
            self.submit(
                request, reply, request_id=request_id, is_abandoned=is_abandoned, listener=listener
            )
        except EngineError as error:
            self.refuse(error, reply, request_id)
        except Exception as error:
            logger.exception("this is a bug")
            self.refuse(EngineError(f"this is a bug: {type(error).__name__}"), reply, request_id)

    def cancel(self, request_id: str) -> bool:
        """Cancel the request of that id; False if none is in flight.

        Raises:
            InvalidRequest: several requests in flight have this id, and none is cancelled.
        """
        jobs = [job for job in self.jobs if job.request_id == request_id]
        if len(jobs) > 1:
            raise InvalidRequest(
                "request_id", f"{request_id!r} names {len(jobs)} requests, allowed is one"
            )
        for job in jobs:
            job.cancel()
        return bool(jobs)

    @property
    @abstractmethod
    def jobs(self) -> list[Job]:
        """The requests in flight."""

    @abstractmethod
    def submit(
        self,
        request: ImageRequest,
        reply: Reply,
        *,
        request_id: str = "",
        is_abandoned: IsAbandoned = never,
        listener: Listener | None = None,
    ) -> Job:
        """Queue a request; the arguments are those of `ask`.

        Raises:
            Overloaded: there is too much to do; with the time until there is not.
            EngineError: it could not start, or is closing.
            InvalidRequest: the prompt or the sampler cannot be what the request says.
        """

    @abstractmethod
    def refuse(self, error: EngineError, reply: Reply, request_id: str = "") -> None:
        """Answer a request that is not admitted."""
