"""The engine: one thread that turns, and the doors through which requests come in."""

import logging
import threading
import time

import numpy as np

from darkroom_engine.batch import StepBatch
from darkroom_engine.config import EngineConfig
from darkroom_engine.developer import Developer
from darkroom_engine.errors import EngineError, InvalidRequest, NetworkFailed
from darkroom_engine.job import Job, Reply
from darkroom_engine.manifest import Manifest
from darkroom_engine.networks import Networks
from darkroom_engine.noise import GaussianNoise
from darkroom_engine.prompts import PromptEncoder
from darkroom_engine.request import ImageRequest, Limits
from darkroom_engine.sample import Sample
from darkroom_engine.samplers import Samplers
from darkroom_engine.scheduler import Scheduler
from darkroom_engine.solver import initial_state
from darkroom_engine.tokenizer import PromptTokenizer

logger = logging.getLogger(__name__)

NETWORKS_TIMEOUT_S = 600.0


class Engine:
    """Continuous batching of denoising steps over one set of networks.

    `submit` and `close` may be called from any thread. Everything else happens on the engine's own
    thread, which holds the lock only to look at the scheduler, never during a network call.
    """

    def __init__(self, manifest: Manifest, networks: Networks, config: EngineConfig) -> None:
        self._manifest = manifest
        self._networks = networks
        self._config = config
        max_batch_size = manifest.networks["unet"].max_batch_size
        if config.max_rows > max_batch_size:
            raise ValueError(
                f"max_rows: {config.max_rows} is above the {max_batch_size} that the unet takes"
            )
        self._samplers = Samplers.from_config(manifest.noise_schedule, manifest.solver)
        self.limits = Limits(samplers=self._samplers.names, **manifest.limits)
        tokenizer = PromptTokenizer.from_config(manifest.tokenizer, manifest.directory)
        self._prompts = PromptEncoder(tokenizer, networks, config.prompt_cache_bytes)
        self._scheduler = Scheduler(config.max_rows, config.max_queue_size)
        self._developer = Developer(networks, manifest, config.max_decode_rows)
        self._changed = threading.Condition()
        self._num_steps = 0
        self._is_closing = False
        self._start_error: EngineError | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Start the thread; requests are taken at once and run when the networks are warm."""
        self._thread.start()

    def close(self) -> None:
        """Answer everything that is still here with an error, and stop."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        self._thread.join()

    def submit(self, request: ImageRequest, reply: Reply) -> Job:
        """Queue a request; `reply` is called exactly once, from another thread.

        Raises:
            Overloaded: the queue is full.
            EngineError: the engine could not start, or is closing.
            InvalidRequest: the sampler cannot do that number of steps.
        """
        job = Job(request, reply)
        job.notes += self._prompts.truncation_notes(
            prompt=request.prompt, negative_prompt=request.negative_prompt
        )
        try:
            table = self._samplers.table(request.sampler, request.num_inference_steps)
        except ValueError as error:
            raise InvalidRequest("sampler", f"{request.sampler!r}: {error}") from None
        factor = self._manifest.vae_scale_factor
        shape = (
            self._manifest.latent_channels,
            request.height // factor,
            request.width // factor,
        )
        samples = [
            Sample(job, index, table, shape) for index in range(request.num_images_per_prompt)
        ]
        with self._changed:
            if self._start_error:
                raise self._start_error
            if self._is_closing:
                raise EngineError("the engine is stopping")
            job.submitted_step = self._num_steps
            self._scheduler.submit(samples)
            self._changed.notify()
        return job

    def turn(self) -> None:
        """One turn: retire, admit, step one batch, hand over what is finished."""
        with self._changed:
            expired = self._scheduler.retire(time.monotonic())
            admitted = self._scheduler.admit()
        for job, error in expired:
            job.fail(error)
        failed = [sample for sample in admitted if not self._prepare(sample)]
        with self._changed:
            self._scheduler.remove(failed)
            samples = self._scheduler.next_batch()
        if not samples:
            return
        self._step(samples)
        finished = [s for s in samples if s.is_finished and not s.job.is_over]
        with self._changed:
            self._scheduler.remove(s for s in samples if s.is_finished or s.job.is_over)
        self._developer.submit(finished)

    def _run(self) -> None:
        try:
            self._warm_up()
        except EngineError as error:
            self._refuse_all(error)
            return
        except Exception as error:
            logger.exception("this is a bug")
            self._refuse_all(EngineError(f"this is a bug: {error!r}"))
            return
        self._developer.start()
        while self._wait_for_work():
            try:
                self.turn()
            except Exception as error:
                # Whatever went wrong, its requests get an answer and the next turn comes.
                logger.exception("this is a bug")
                self._fail_all(EngineError(f"this is a bug: {error!r}"))
        self._fail_all(EngineError("the engine is stopping"))
        self._developer.close()

    def _wait_for_work(self) -> bool:
        """Sleep until there is something to do; False when the engine is to stop."""
        with self._changed:
            self._changed.wait_for(lambda: self._scheduler.has_work or self._is_closing)
            return not self._is_closing

    def _prepare(self, sample: Sample) -> bool:
        """Give an admitted sample its embeddings and its noise; False if that failed."""
        job = sample.job
        if job.is_over:
            return False
        if job.started_at is None:
            job.started_at = time.monotonic()
            job.started_step = self._num_steps
        try:
            sample.conditional = self._prompts.encode(job.request.prompt)
            if job.request.is_guided:
                sample.unconditional = self._prompts.encode(job.request.negative_prompt)
        except EngineError as error:
            job.fail(error)
            return False
        sample.noise = GaussianNoise(sample.seed)
        sample.state = initial_state(sample.noise.draw(sample.latent_shape), sample.table)
        return True

    def _step(self, samples: list[Sample]) -> None:
        """One UNet call; a failure ends the jobs of the rows it hit and of no others."""
        batch = StepBatch(samples)
        with self._changed:
            self._num_steps += 1
        try:
            outputs = self._networks.denoise(*batch.inputs())
        except EngineError as error:
            for sample in samples:
                sample.job.fail(error)
            return
        for sample, failure in batch.apply(outputs):
            sample.job.fail(failure)

    def _fail_all(self, error: EngineError) -> None:
        with self._changed:
            samples = self._scheduler.samples()
            self._scheduler.remove(samples)
        for sample in samples:
            sample.job.fail(error)

    def _refuse_all(self, error: EngineError) -> None:
        logger.error("the engine could not start: %s", error)
        with self._changed:
            self._start_error = error
        self._fail_all(error)

    def _warm_up(self) -> None:
        """Run every network at every batch size from 1 to `warmup_rows`, at the smallest size."""
        networks, manifest = self._networks, self._manifest
        networks.wait_until_ready(NETWORKS_TIMEOUT_S, lambda: self._is_closing)
        conditioning = self._prompts.encode("")
        factor = manifest.vae_scale_factor
        shape = (
            manifest.latent_channels,
            self.limits.min_size // factor,
            self.limits.min_size // factor,
        )
        for rows in range(1, self._config.warmup_rows + 1):
            latents = np.zeros((rows, *shape), np.float32)
            repeated = {name: np.stack([row] * rows) for name, row in conditioning.items()}
            output = networks.denoise(latents, np.zeros(rows, np.float32), repeated)
            if output.shape != latents.shape:
                raise NetworkFailed("unet", f"made {output.shape} of {latents.shape}")
        pixels = networks.decode(np.zeros((1, *shape), np.float32))
        expected = (1, 3, shape[1] * factor, shape[2] * factor)
        if pixels.shape != expected:
            raise NetworkFailed("vae_decoder", f"made {pixels.shape}, expected {expected}")
