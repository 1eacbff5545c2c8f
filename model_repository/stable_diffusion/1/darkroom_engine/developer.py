"""From finished latents to answered requests, on a thread of its own."""

import logging
import queue
import threading
import time
from collections.abc import Callable

import numpy as np

from darkroom_engine import metrics, pictures
from darkroom_engine.errors import EngineError, NetworkFailed
from darkroom_engine.manifest import Manifest
from darkroom_engine.metrics import Record
from darkroom_engine.pace import Pace
from darkroom_engine.sample import Sample
from darkroom_engine.steady import SteadyNetworks

logger = logging.getLogger(__name__)


class Developer:
    """Decodes, encodes and delivers finished samples, so that the next step need not wait."""

    def __init__(
        self,
        networks: SteadyNetworks,
        manifest: Manifest,
        max_decode_rows: int,
        pace: Pace,
        record: Record,
        *,
        is_overlapped: bool,
        on_progress: Callable[[], None],
    ) -> None:
        """Decode up to `max_decode_rows` samples a call, beside the steps if `is_overlapped`.

        `on_progress` is called when `backlog` has become less.
        """
        self._networks = networks
        self._manifest = manifest
        self._max_decode_rows = max_decode_rows
        self._pace = pace
        self._is_overlapped = is_overlapped
        self._on_progress = on_progress
        self._num_submitted = 0
        self._num_developed = 0
        self._record = record
        self._finished: queue.SimpleQueue[Sample | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="developer", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def backlog(self) -> int:
        """Samples that are not developed yet."""
        return self._num_submitted - self._num_developed

    def submit(self, samples: list[Sample]) -> None:
        self._num_submitted += len(samples)
        if not self._is_overlapped:
            self._develop_all(samples)
            return
        for sample in samples:
            self._finished.put(sample)

    def close(self) -> None:
        """Finish what was submitted, then stop."""
        self._finished.put(None)
        self._thread.join()

    def _run(self) -> None:
        is_open = True
        while is_open:
            arrived = [self._finished.get()]
            while not self._finished.empty():
                arrived.append(self._finished.get())
            is_open = None not in arrived
            self._develop_all([sample for sample in arrived if sample is not None])

    def _develop_all(self, samples: list[Sample]) -> None:
        while samples:
            samples = self._develop_some(samples)

    def _develop_some(self, samples: list[Sample]) -> list[Sample]:
        """Develop up to `max_decode_rows` samples of the first one's shape; returns the others."""
        shape = samples[0].latent_shape
        chunk = [sample for sample in samples if sample.latent_shape == shape]
        chunk = chunk[: self._max_decode_rows]
        try:
            self._develop(chunk)
        except EngineError as error:
            for sample in chunk:
                sample.job.fail(error)
        except Exception as error:
            logger.exception("this is a bug")
            for sample in chunk:
                sample.job.fail(EngineError(f"this is a bug: {error!r}"))
        self._num_developed += len(chunk)
        self._on_progress()
        return [sample for sample in samples if sample not in chunk]

    def _develop(self, samples: list[Sample]) -> None:
        samples = [sample for sample in samples if not sample.job.is_over]
        if not samples:
            return
        num_failures = self._networks.num_failures
        now = time.monotonic()
        latents = np.stack([sample.latents for sample in samples])
        decoded = self._networks.decode(latents / np.float32(self._manifest.vae_scaling_factor))
        model, engine = self._manifest.name, self._manifest.sha256[:12]
        for sample, pixels in zip(samples, decoded, strict=True):
            job = sample.job
            if not np.isfinite(pixels).all():
                job.fail(NetworkFailed("vae_decoder", "output is not finite"))
                continue
            job.denoised_at = now
            facts = pictures.provenance(job.request, sample.seed, model, engine)
            picture = pictures.encode(pictures.to_uint8(pixels), job.request.output_format, facts)
            self._record(metrics.IMAGES, 1)
            job.deliver(sample.index, picture, {"model": model, "engine": engine})
        seconds = time.monotonic() - now
        self._record(metrics.DECODE_SECONDS, seconds)
        if self._networks.num_failures == num_failures:
            self._pace.record_decode(samples[0].latent_shape, seconds / len(samples))
