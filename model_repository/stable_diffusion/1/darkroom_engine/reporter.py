"""Tells listeners how their requests get on, in order, on a thread of its own."""

import logging
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from darkroom_engine import pictures
from darkroom_engine.arrays import Arrays
from darkroom_engine.batch import Progress
from darkroom_engine.errors import EngineError
from darkroom_engine.job import JobResult, Listener, Reply
from darkroom_engine.manifest import Manifest
from darkroom_engine.solver import predicted_x0

MAX_BACKLOG = 1024
"""Steps that may wait to be told; those beyond it are left out."""
MAX_PREVIEW_BACKLOG = 32
"""Where more steps than this wait, their previews are left out, which hold latents."""
CLOSE_TIMEOUT_S = 5.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Event:
    listener: Listener
    fields: dict[str, Any]
    latents: Callable[[], NDArray[np.float32]] | None = None
    """Waits for the x_0 to be shown, (C, h, w)."""


class Reporter:
    """One queue and one thread, so that a request's events arrive in the order they happened.

    The answer takes the same way, and therefore comes last. Whoever reports never waits.
    """

    def __init__(self, manifest: Manifest, arrays: Arrays, on_drop: Callable[[int], None]) -> None:
        self._manifest = manifest
        self._arrays = arrays
        self._on_drop = on_drop
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="reporter", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Tell what is left, then stop; a listener that never returns is not waited for."""
        self._queue.put(None)
        if self._thread.is_alive():
            self._thread.join(CLOSE_TIMEOUT_S)

    def queued(self, listener: Listener, position: int) -> None:
        event = _Event(listener, {"type": "queued", "position": position})
        self._queue.put(lambda: self._tell([event]))

    def stepped(self, made: Sequence[Progress]) -> None:
        """Report the steps that samples have just made."""
        events = []
        for sample, step, state in made:
            listener = sample.job.listener
            if listener is None:
                continue
            progress = {
                "index": sample.index,
                "step": step,
                "num_steps": sample.table.num_steps,
            }
            events.append(_Event(listener, {"type": "step", **progress}))
            interval = listener.preview_interval
            # The last step's picture is the picture.
            if not interval or step % interval or step == sample.table.num_steps:
                continue
            if self._queue.qsize() > MAX_PREVIEW_BACKLOG:
                self._on_drop(1)
            else:
                latents = predicted_x0(state, sample.table, step - 1)
                shown = self._arrays.fetch(latents)
                events.append(_Event(listener, {"type": "preview", **progress}, shown))
        if not events:
            return
        if self._queue.qsize() > MAX_BACKLOG:
            self._on_drop(len(events))
            return
        self._queue.put(lambda: self._tell(events))

    def answer(self, reply: Reply, answer: JobResult | EngineError) -> None:
        self._queue.put(lambda: reply(answer))

    def _tell(self, events: list[_Event]) -> None:
        for event in events:
            # One listener's trouble is not the others'.
            with _logged():
                event.listener.on_event(event.fields, self._preview(event))

    def _preview(self, event: _Event) -> bytes | None:
        if event.latents is None:
            return None
        manifest = self._manifest
        return pictures.preview(event.latents(), manifest.preview_matrix, manifest.preview_bias)

    def _run(self) -> None:
        while (tell := self._queue.get()) is not None:
            with _logged():
                tell()


@contextmanager
def _logged() -> Iterator[None]:
    try:
        yield
    except Exception:
        logger.exception("an event could not be told")
