"""A request on its way: it ends in exactly one answer, whatever happens to its samples."""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from darkroom_engine.canvas import Canvas
from darkroom_engine.errors import Cancelled, EngineError
from darkroom_engine.request import ImageRequest

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class JobResult:
    """The answer to a request that went well."""

    pictures: list[bytes]
    """Encoded as the request's `output_format` says."""
    seeds: list[int]
    info: dict[str, Any]


Reply = Callable[[JobResult | EngineError], None]


class Listener(Protocol):
    """One that wants to know how its request gets on, told by a thread that may wait for it."""

    preview_interval: int
    """A preview after every so many steps; 0 for none."""

    def on_event(self, event: dict[str, Any], preview: bytes | None) -> None:
        """An event of type queued, step or preview, the last with a JPEG."""


def _ignore_end(job: "Job", answer: JobResult | EngineError) -> None:
    pass


class Job:
    """One admitted request and the answer that it is owed.

    `deliver`, `fail` and `cancel` may be called from any thread, in any order and repeatedly; the
    first that completes the job sends the answer, all later ones are ignored.
    """

    def __init__(
        self,
        request: ImageRequest,
        reply: Reply,
        request_id: str = "",
        listener: Listener | None = None,
        on_end: "Callable[[Job, JobResult | EngineError], None]" = _ignore_end,
    ) -> None:
        self.request = request
        self.request_id = request_id
        self.listener = listener
        self._on_end = on_end
        self.notes: list[str] = []
        self.is_held = False
        """Whether its samples wait for what they start from."""
        self.canvas: Canvas | None = None
        """What its samples start from, once it is there; see `canvas`."""
        self.submitted_at = time.monotonic()
        self.started_at: float | None = None
        # Set by the engine, counted in UNet calls since it started.
        self.submitted_step = 0
        self.started_step = 0
        self.denoised_at: float | None = None
        self.position: int | None = None
        """What its listener was last told: how many start before it."""
        self._reply = reply
        self._lock = threading.Lock()
        self._is_over = False
        self._pictures: dict[int, bytes] = {}
        self._nsfw: dict[int, bool] = {}

    @property
    def needs_canvas(self) -> bool:
        """Whether there are pictures to be prepared before it can start."""
        return self.request.start is not None or bool(self.request.controls)

    @property
    def is_over(self) -> bool:
        """Whether the answer was sent, so that its samples may leave."""
        return self._is_over

    @property
    def deadline(self) -> float | None:
        """On the clock of `time.monotonic`, seconds."""
        timeout_ms = self.request.timeout_ms
        return None if timeout_ms is None else self.submitted_at + timeout_ms / 1000

    def deliver(
        self, index: int, picture: bytes, info: dict[str, Any], is_nsfw: bool | None = None
    ) -> None:
        """Hand in picture `index`; the last one sends the answer, with `info` added to its info.

        `is_nsfw` is what a safety checker said of it, None if there is none.
        """
        request = self.request
        with self._lock:
            self._pictures[index] = picture
            if is_nsfw is not None:
                self._nsfw[index] = is_nsfw
            is_last = len(self._pictures) == request.num_images_per_prompt
        if not is_last:
            return
        order = range(request.num_images_per_prompt)
        self._finish(
            JobResult(
                pictures=[self._pictures[index] for index in order],
                seeds=[request.seed + index for index in order],
                info={
                    **info,
                    **self._checked(order),
                    "num_inference_steps": request.num_inference_steps,
                    "queue_steps": self.started_step - self.submitted_step,
                    "notes": self.notes,
                    "timings": self.timings(),
                },
            )
        )

    def _checked(self, order: range) -> dict[str, Any]:
        if not self._nsfw:
            return {}
        return {"nsfw_content_detected": [self._nsfw[index] for index in order]}

    def fail(self, error: EngineError) -> None:
        self._finish(error)

    def cancel(self) -> None:
        self._finish(Cancelled("the request was cancelled"))

    def _finish(self, answer: JobResult | EngineError) -> None:
        with self._lock:
            if self._is_over:
                return
            self._is_over = True
        try:
            self._reply(answer)
        except Exception:
            # The caller may be gone; that must not take down the thread that others depend on.
            logger.exception("an answer could not be sent")
        self._on_end(self, answer)

    def timings(self) -> dict[str, float]:
        """Milliseconds of each phase until now."""
        now = time.monotonic()
        started = self.started_at or now
        denoised = self.denoised_at or now
        seconds = {
            "queue_ms": started - self.submitted_at,
            "denoise_ms": denoised - started,
            "decode_ms": now - denoised,
            "total_ms": now - self.submitted_at,
        }
        return {name: round(1000 * value, 3) for name, value in seconds.items()}
