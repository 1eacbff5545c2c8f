"""All that the VAE does, on a thread of its own: what is started from, and what is finished."""

import logging
import queue
import threading
import time
from collections.abc import Callable

import numpy as np

from darkroom_engine import metrics, pictures
from darkroom_engine.canvas import Canvas
from darkroom_engine.errors import EngineError, NetworkFailed
from darkroom_engine.job import Job
from darkroom_engine.manifest import VAE_DECODER, Manifest
from darkroom_engine.metrics import Record
from darkroom_engine.pace import Pace
from darkroom_engine.safety import SafetyChecker
from darkroom_engine.sample import Sample
from darkroom_engine.steady import SteadyNetworks
from darkroom_engine.vae import Vae

logger = logging.getLogger(__name__)


class Developer:
    """Decodes and delivers finished samples, and prepares what others start from.

    The next step waits for neither.
    """

    def __init__(
        self,
        networks: SteadyNetworks,
        vae: Vae,
        safety_checker: SafetyChecker,
        manifest: Manifest,
        *,
        max_decode_rows: int,
        pace: Pace,
        record: Record,
        is_overlapped: bool,
        on_progress: Callable[[], None],
        rest: Callable[[], None],
    ) -> None:
        """Decode up to `max_decode_rows` samples a call, beside the steps if `is_overlapped`.

        `on_progress` is called when `backlog` has become less, or a job is held no longer; `rest`
        when there is nothing to do.
        """
        self._networks = networks
        self._vae = vae
        self._safety_checker = safety_checker
        self._manifest = manifest
        self._max_decode_rows = max_decode_rows
        self._pace = pace
        self._is_overlapped = is_overlapped
        self._on_progress = on_progress
        self._rest = rest
        self._num_submitted = 0
        self._num_developed = 0
        self._record = record
        self._arrived: queue.SimpleQueue[Sample | Job | None] = queue.SimpleQueue()
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
            self._arrived.put(sample)

    def prepare_beside(self, job: Job) -> None:
        """Prepare the job's canvas beside the steps of others; until then it is held.

        Where nothing is done beside them, it is not held, and to be prepared by `prepare`.
        """
        if self._is_overlapped:
            job.is_held = True
            self._arrived.put(job)

    def prepare(self, job: Job) -> Canvas:
        """The job's canvas, made now if it is not there.

        Raises:
            NetworkFailed: the encoder failed.
        """
        if job.canvas is None:
            is_masked_shown = bool(self._manifest.denoiser.extra_channels)
            job.canvas = Canvas.prepare(job.request, self._vae, is_masked_shown=is_masked_shown)
        return job.canvas

    def close(self) -> None:
        """Finish what was submitted, then stop."""
        self._arrived.put(None)
        self._thread.join()

    def _run(self) -> None:
        is_open = True
        while is_open:
            if self._arrived.empty():
                self._rest()
            arrived = [self._arrived.get()]
            while not self._arrived.empty():
                arrived.append(self._arrived.get())
            is_open = None not in arrived
            # Those that have not begun go first: the sooner they join the batch, the fuller it is.
            for job in arrived:
                if isinstance(job, Job):
                    self._release(job)
            self._develop_all([sample for sample in arrived if isinstance(sample, Sample)])

    def _release(self, job: Job) -> None:
        try:
            if not job.is_over:
                self.prepare(job)
        except EngineError as error:
            job.fail(error)
        except Exception as error:
            logger.exception("this is a bug")
            job.fail(EngineError(f"this is a bug: {error!r}"))
        job.is_held = False
        self._on_progress()

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
        undecoded = [sample for sample in samples if sample.job.request.output_format == "latent"]
        for sample in undecoded:
            self._deliver(sample, pictures.encode_latents(sample.result()), now)
        samples = [sample for sample in samples if sample not in undecoded]
        if not samples:
            return
        decoded = self._vae.decode(np.stack([sample.result() for sample in samples]))
        for sample, pixels in zip(samples, decoded, strict=True):
            job = sample.job
            if not np.isfinite(pixels).all():
                job.fail(NetworkFailed(VAE_DECODER, "output is not finite"))
                continue
            levels, is_nsfw = self._safety_checker.check(pictures.to_uint8(pixels))
            model, engine = self._served
            facts = pictures.provenance(job.request, sample.seed, model, engine)
            picture = pictures.encode(levels, job.request.output_format, facts)
            self._deliver(sample, picture, now, is_nsfw)
        seconds = time.monotonic() - now
        self._record(metrics.DECODE_SECONDS, seconds)
        if self._networks.num_failures == num_failures:
            self._pace.record_decode(samples[0].latent_shape, seconds / len(samples))

    @property
    def _served(self) -> tuple[str, str]:
        """The model and the hash of what it was exported to."""
        return self._manifest.name, self._manifest.sha256[:12]

    def _deliver(
        self, sample: Sample, picture: bytes, denoised_at: float, is_nsfw: bool | None = None
    ) -> None:
        model, engine = self._served
        sample.job.denoised_at = denoised_at
        self._record(metrics.IMAGES, 1)
        sample.job.deliver(sample.index, picture, {"model": model, "engine": engine}, is_nsfw)
