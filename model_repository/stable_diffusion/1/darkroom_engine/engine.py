"""The engine: one thread that turns, and the doors through which requests come in."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from darkroom_engine import journal, metrics
from darkroom_engine.batch import StepBatch
from darkroom_engine.config import EngineConfig
from darkroom_engine.denoiser import Denoiser
from darkroom_engine.developer import Developer
from darkroom_engine.errors import EngineError
from darkroom_engine.intake import Intake, never
from darkroom_engine.job import Job, JobResult, Listener, Reply
from darkroom_engine.manifest import VAE_DECODER, Manifest
from darkroom_engine.memory import rows_that_fit
from darkroom_engine.metrics import Record, record_nothing
from darkroom_engine.networks import Networks, Shape
from darkroom_engine.offer import describe, limits_of
from darkroom_engine.pace import Pace
from darkroom_engine.prompts import PromptEncoder
from darkroom_engine.rehearsal import rehearse
from darkroom_engine.reporter import Reporter
from darkroom_engine.request import ImageRequest
from darkroom_engine.safety import SafetyChecker, SafetyMode
from darkroom_engine.sample import Sample
from darkroom_engine.sample_maker import SampleMaker
from darkroom_engine.samplers import Samplers
from darkroom_engine.scheduler import Scheduler, Work
from darkroom_engine.steady import SteadyNetworks
from darkroom_engine.vae import Vae
from darkroom_engine.watcher import IsAbandoned, Watcher

logger = logging.getLogger(__name__)


def _always() -> bool:
    return True


def _do_nothing() -> None:
    pass


class _Step(NamedTuple):
    """A step that may still be computed."""

    batch: StepBatch
    begun_at: float
    is_steady: bool
    """Whether no network failed meanwhile: then its time is a measure."""


class Engine(Intake):
    """Continuous batching of denoising steps over one set of networks.

    `ask`, `submit`, `cancel` and `close` may be called from any thread. Everything else happens on
    the engine's own thread, which holds the lock only to look at the scheduler, never during a
    network call. Three more threads keep out of its way what it need not wait for: the `Developer`
    decodes and answers, the `Reporter` tells listeners, the `Watcher` looks for callers that left.
    """

    def __init__(
        self,
        manifest: Manifest,
        networks: Networks,
        config: EngineConfig,
        record: Record = record_nothing,
        *,
        on_warm: Callable[[], None] = _do_nothing,
        on_failed: Callable[[], None] = _do_nothing,
        is_change_due: Callable[[], bool] = _always,
        rest: Callable[[], None] = _do_nothing,
    ) -> None:
        """Prepare an engine.

        Args:
            record: takes what is to be counted and measured.
            on_warm: called on the engine's thread when requests begin to run.
            on_failed: called there instead when they never will, for a network that is not there.
            is_change_due: asked whether newcomers may begin, who need other networks than those
                that have begun; see `TransientNetworks`.
            rest: called by a thread that has nothing to do for now.

        Raises:
            ValueError: a setting that does not fit the checkpoint.
        """
        self._manifest = manifest
        self._config = config
        self._record = record
        self._on_warm = on_warm
        self._on_failed = on_failed
        self._is_change_due = is_change_due
        self._rest = rest
        denoiser = manifest.denoiser.network
        self._max_batch_size = manifest.networks[denoiser].max_batch_size
        for key, network in (("max_rows", denoiser), ("max_decode_rows", VAE_DECODER)):
            chosen, most = getattr(config, key), manifest.networks[network].max_batch_size
            if chosen is not None and chosen > most:
                raise ValueError(f"{key}: {chosen} is above the {most} that the {network} takes")
        # Set by the warm-up if the config leaves it to us.
        self._num_rows_at_default_size = config.max_rows or 2
        samplers = Samplers.from_config(
            manifest.noise_schedule,
            manifest.solver,
            is_consistency_model=bool(manifest.denoiser.guidance_embedding_size),
        )
        self.limits = limits_of(manifest, samplers.names)
        self._networks = SteadyNetworks(
            networks,
            config.heal_timeout_s,
            lambda name: record(metrics.NETWORK_FAILURES, 1, name),
        )
        self._prompts = PromptEncoder.from_config(
            manifest.text, manifest.directory, self._networks, config.prompt_cache_bytes
        )
        self._denoiser = Denoiser(manifest, self._networks)
        self._arrays = self._networks.arrays
        self._maker = SampleMaker(
            manifest,
            samplers,
            self._prompts,
            self._denoiser,
            arrays=self._arrays,
            record=record,
        )
        self._default_shape = self._maker.shape_of(
            self.limits.default_width, self.limits.default_height
        )
        self._vae = Vae(manifest, self._networks, config.vae_tile_size, config.vae_tile_overlap)
        self._safety_checker = SafetyChecker(
            manifest, self._networks, SafetyMode(config.safety_checker)
        )
        self._pace = Pace()
        self._scheduler = Scheduler(
            self.max_rows, config.max_queue_size, config.seconds_per_priority, self._pace
        )
        self._changed = threading.Condition()
        self._developer = Developer(
            self._networks,
            self._vae,
            self._safety_checker,
            manifest,
            max_decode_rows=config.max_decode_rows,
            pace=self._pace,
            record=record,
            is_overlapped=bool(config.overlap_decode),
            on_progress=self._wake,
            rest=rest,
        )
        self._reporter = Reporter(
            manifest, self._arrays, lambda n: record(metrics.DROPPED_EVENTS, n)
        )
        self._watcher = Watcher()
        self._num_steps = 0
        self._under_way: deque[_Step] = deque()
        self._last_step_ended_at = 0.0
        self._is_closing = False
        self._start_error: EngineError | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Start the threads; requests are taken at once and run when the networks are warm."""
        self._reporter.start()
        self._watcher.start()
        self._thread.start()

    def begin_close(self) -> None:
        """Stop after the step that is being made, and answer what is left with an error."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()

    def close(self) -> None:
        """Answer everything that is still here with an error, and stop."""
        self.begin_close()
        self._thread.join()
        self._watcher.close()
        self._reporter.close()

    def max_rows(self, shape: Shape) -> int:
        """Rows that a UNet call of that latent shape may have."""
        _, height, width = shape
        _, default_height, default_width = self._default_shape
        share = min(1.0, default_height * default_width / (height * width))
        # One guided picture can always run.
        return max(2, int(self._num_rows_at_default_size * share))

    def refuse(self, error: EngineError, reply: Reply, request_id: str = "") -> None:
        journal.log_refusal(request_id, error)
        self._record(metrics.REQUESTS, 1, error.outcome)
        reply(error)

    def submit(
        self,
        request: ImageRequest,
        reply: Reply,
        *,
        request_id: str = "",
        is_abandoned: IsAbandoned = never,
        listener: Listener | None = None,
    ) -> Job:
        """As `Intake.submit`; overloaded is a full queue, or too much before a deadline."""
        job = Job(request, self._ordered(reply, listener), request_id, listener, self._on_end)
        samples = self._maker.samples_of(job)
        with self._changed:
            if self._start_error:
                raise self._start_error
            if self._is_closing:
                raise EngineError("the engine is stopping")
            job.submitted_step = self._num_steps
            self._scheduler.submit(samples)
            if job.needs_canvas:
                self._developer.prepare_beside(job)
            self._watcher.watch(job, is_abandoned)
            self._report_positions()
            self._record_load()
            self._changed.notify()
        return job

    @property
    def jobs(self) -> list[Job]:
        return self._watcher.jobs()

    @property
    def work(self) -> Work:
        """What is left to do for those requests."""
        with self._changed:
            return self._scheduler.work

    def describe(self) -> dict[str, Any]:
        """What this engine serves, see `offer`."""
        return describe(self._manifest, self.limits, self._config)

    def turn(self) -> None:
        """One turn: let go of what is over, step one batch, hand over what is finished."""
        with self._changed:
            self._scheduler.retire()
            samples = self._scheduler.next_batch(time.monotonic())
        begun = [sample for sample in samples if sample.is_started]
        if begun and not self._is_change_due():
            samples = begun
        started = [sample for sample in samples if sample.is_started or self._start(sample)]
        if started:
            self._step(started)
        # While a device computes a step, the next is prepared, and no further one: whoever comes
        # now is to join the one after.
        num_ended = len(self._under_way) - (self._arrays.max_steps_ahead if started else 0)
        ended = list(self._under_way)[: max(0, num_ended)]
        finished = [sample for step in ended for sample in self._end_step(step)]
        with self._changed:
            self._scheduler.remove(s for s in samples if s.job.is_over or s.is_finished)
            self._report_positions()
            self._record_load()
        # Not before: whatever goes wrong, somebody answers for every sample.
        for _ in ended:
            self._under_way.popleft()
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
        self._on_warm()
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
            if not (self._can_turn or self._is_closing):
                self._rest()
            self._changed.wait_for(lambda: self._can_turn or self._is_closing)
            return not self._is_closing

    @property
    def _can_turn(self) -> bool:
        if self._under_way:
            return True
        # More steps would only make the heap of undecoded pictures larger, which counts nowhere.
        return self._scheduler.has_work and self._developer.backlog < self._max_batch_size

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify()

    def _start(self, sample: Sample) -> bool:
        """Give a sample its conditioning and what it starts with; False if that failed."""
        job = sample.job
        if job.is_over:
            return False
        if job.started_at is None:
            job.started_at = time.monotonic()
            job.started_step = self._num_steps
            self._record(metrics.QUEUE_SECONDS, job.started_at - job.submitted_at)
        try:
            self._maker.ready(sample, self._developer.prepare(job))
        except EngineError as error:
            job.fail(error)
            return False
        return True

    def _step(self, samples: list[Sample]) -> None:
        """Begin a step; a failure ends the jobs of the rows it hit and of no others."""
        batch = StepBatch(samples, self._arrays)
        with self._changed:
            self._num_steps += 1
        num_failures = self._networks.num_failures
        begun_at = time.monotonic()
        try:
            batch.apply(self._denoiser.predict(batch))
        except EngineError as error:
            for sample in samples:
                sample.job.fail(error)
            return
        is_steady = self._networks.num_failures == num_failures
        self._under_way.append(_Step(batch, begun_at, is_steady))

    def _end_step(self, step: "_Step") -> list[Sample]:
        """Wait for a step, and tell of it; returns the samples that it has finished."""
        batch = step.batch
        failures: list[tuple[Sample, EngineError]]
        try:
            failures = [*batch.failures()]
        except EngineError as error:
            failures = [(sample, error) for sample in batch.samples]
        for sample, failure in failures:
            sample.job.fail(failure)
        now = time.monotonic()
        seconds = now - max(step.begun_at, self._last_step_ended_at)
        self._last_step_ended_at = now
        # Who failed has been answered, and hears nothing after that.
        made = [progress for progress in batch.made if not progress.sample.job.is_over]
        self._reporter.stepped(made)
        if step.is_steady:
            shape = batch.samples[0].latent_shape
            self._pace.record_step(shape, batch.num_rows, seconds)
        self._record(metrics.STEP_SECONDS, seconds, metrics.rows_label(batch.num_rows))
        self._record(metrics.BATCH_ROWS, batch.num_rows)
        self._record(metrics.BATCH_PICTURES, len(batch.samples))
        return [it.sample for it in made if it.step == it.sample.table.num_steps]

    def _ordered(self, reply: Reply, listener: Listener | None) -> Reply:
        """The reply as it must be called, for a listener to hear of the end after all else."""
        return reply if listener is None else lambda answer: self._reporter.answer(reply, answer)

    def _report_positions(self) -> None:
        """Tell the listeners that wait how many start before them, where that has changed."""
        if not any(s.job.listener and not s.is_started for s in self._scheduler.samples()):
            return
        for sample, position in self._scheduler.positions().items():
            job = sample.job
            # The first picture of a request speaks for all.
            if sample.index == 0 and job.listener and job.position != position:
                job.position = position
                self._reporter.queued(job.listener, position)

    def _record_load(self) -> None:
        self._record(metrics.WAITING, self._scheduler.num_waiting)
        self._record(metrics.RUNNING, self._scheduler.num_running)

    def _on_end(self, job: Job, answer: JobResult | EngineError) -> None:
        outcome = answer.outcome if isinstance(answer, EngineError) else "image"
        self._record(metrics.REQUESTS, 1, outcome)
        self._record(metrics.REQUEST_SECONDS, time.monotonic() - job.submitted_at, outcome)
        journal.log_end(job, answer)

    def _fail_all(self, error: EngineError) -> None:
        with self._changed:
            samples = self._scheduler.samples()
            self._scheduler.remove(samples)
        # Those that have made their last step are not the scheduler's any more.
        samples += [sample for step in self._under_way for sample in step.batch.samples]
        self._under_way.clear()
        for sample in samples:
            sample.job.fail(error)

    def _refuse_all(self, error: EngineError) -> None:
        logger.error("the engine could not start: %s", error)
        with self._changed:
            self._start_error = error
        # Before those that wait hear of it, and ask again.
        self._on_failed()
        self._fail_all(error)

    def _warm_up(self) -> None:
        """Make every network's first calls, and learn what they cost."""
        config, denoiser = self._config, self._denoiser
        shape = self._maker.shape_of(self.limits.min_size, self.limits.min_size)
        rehearse(
            self._manifest,
            self._networks,
            self._prompts,
            denoiser,
            vae=self._vae,
            safety_checker=self._safety_checker,
            shape=shape,
            is_given_up=lambda: self._is_closing,
        )
        for num_rows in range(1, config.warmup_rows + 1):
            self._warm_up_step(num_rows, shape)
        if config.max_rows is None:
            self._num_rows_at_default_size = rows_that_fit(
                lambda num_rows: denoiser.predict_blank(num_rows, self._default_shape),
                self._max_batch_size,
                self._networks.available_bytes,
            )
        self._record(metrics.MAX_ROWS, self._num_rows_at_default_size)
        prepared = {min(n, self._num_rows_at_default_size) for n in self._networks.prepared_rows}
        # The largest first: what a device keeps for it then serves the smaller ones too.
        for num_rows in sorted(prepared, reverse=True):
            self._warm_up_step(num_rows, self._default_shape)
        if prepared:
            self._vae.decode(np.zeros((1, *self._default_shape), np.float32))

    def _warm_up_step(self, num_rows: int, shape: Shape) -> None:
        self._denoiser.predict_blank(num_rows, shape)
        # The first call of a size may cost more than those after it.
        start = time.monotonic()
        self._denoiser.predict_blank(num_rows, shape)
        self._pace.record_step(shape, num_rows, time.monotonic() - start)
