"""The engine: one thread that turns, and the doors through which requests come in."""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from darkroom_engine import journal, metrics
from darkroom_engine.batch import StepBatch
from darkroom_engine.config import EngineConfig
from darkroom_engine.denoiser import Denoiser
from darkroom_engine.developer import Developer
from darkroom_engine.errors import EngineError, InvalidRequest
from darkroom_engine.job import Job, JobResult, Listener, Reply
from darkroom_engine.manifest import Manifest
from darkroom_engine.memory import rows_that_fit
from darkroom_engine.metrics import Record, record_nothing
from darkroom_engine.networks import Conditioning, Networks, Shape
from darkroom_engine.pace import Pace
from darkroom_engine.prompts import PromptEncoder
from darkroom_engine.reader import Field
from darkroom_engine.reporter import Reporter
from darkroom_engine.request import MODES, OUTPUT_FORMATS, ImageRequest, Limits
from darkroom_engine.safety import SafetyChecker, SafetyMode
from darkroom_engine.sample import Group, Sample
from darkroom_engine.samplers import BadChoice, Samplers
from darkroom_engine.scheduler import Scheduler
from darkroom_engine.steady import SteadyNetworks
from darkroom_engine.vae import Vae
from darkroom_engine.watcher import IsAbandoned, Watcher

logger = logging.getLogger(__name__)

NETWORKS_TIMEOUT_S = 600.0


def _never() -> bool:
    return False


def _always() -> bool:
    return True


def _do_nothing() -> None:
    pass


class Engine:
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
        is_change_due: Callable[[], bool] = _always,
        rest: Callable[[], None] = _do_nothing,
    ) -> None:
        """Prepare an engine.

        Args:
            record: takes what is to be counted and measured.
            on_warm: called on the engine's thread when requests begin to run.
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
        self._is_change_due = is_change_due
        self._rest = rest
        denoiser = manifest.denoiser.network
        self._max_batch_size = manifest.networks[denoiser].max_batch_size
        if config.max_rows is not None and config.max_rows > self._max_batch_size:
            raise ValueError(
                f"max_rows: {config.max_rows} is above the {self._max_batch_size} that the "
                f"{denoiser} takes"
            )
        # Set by the warm-up if the config leaves it to us.
        self._num_rows_at_default_size = config.max_rows or 2
        self._samplers = Samplers.from_config(manifest.noise_schedule, manifest.solver)
        self.limits = _limits(manifest, self._samplers.names)
        self._default_shape = self._shape_of(self.limits.default_width, self.limits.default_height)
        self._networks = SteadyNetworks(
            networks,
            config.heal_timeout_s,
            lambda name: record(metrics.NETWORK_FAILURES, 1, name),
        )
        self._prompts = PromptEncoder.from_config(
            manifest.text, manifest.directory, self._networks, config.prompt_cache_bytes
        )
        self._denoiser = Denoiser(manifest, self._networks)
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
        self._reporter = Reporter(manifest, lambda n: record(metrics.DROPPED_EVENTS, n))
        self._watcher = Watcher()
        self._num_steps = 0
        self._is_closing = False
        self._start_error: EngineError | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Start the threads; requests are taken at once and run when the networks are warm."""
        self._reporter.start()
        self._watcher.start()
        self._thread.start()

    def close(self) -> None:
        """Answer everything that is still here with an error, and stop."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
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

    def ask(
        self,
        fields: Mapping[str, Field],
        reply: Reply,
        *,
        request_id: str = "",
        is_abandoned: IsAbandoned = _never,
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

    def refuse(self, error: EngineError, reply: Reply, request_id: str = "") -> None:
        """Answer a request that is not admitted."""
        journal.log_refusal(request_id, error)
        self._record(metrics.REQUESTS, 1, error.outcome)
        reply(error)

    def submit(
        self,
        request: ImageRequest,
        reply: Reply,
        *,
        request_id: str = "",
        is_abandoned: IsAbandoned = _never,
        listener: Listener | None = None,
    ) -> Job:
        """Queue a request; the arguments are those of `ask`.

        Raises:
            Overloaded: the queue is full, or the request's deadline cannot be kept.
            EngineError: the engine could not start, or is closing.
            InvalidRequest: the prompt or the sampler cannot be what the request says.
        """
        job = Job(request, self._ordered(reply, listener), request_id, listener, self._on_end)
        samples = self._samples_of(job)
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

    def cancel(self, request_id: str) -> bool:
        """Cancel the request of that id; False if none is in flight.

        Raises:
            InvalidRequest: several requests in flight have this id, and none is cancelled.
        """
        jobs = [job for job in self._watcher.jobs() if job.request_id == request_id]
        if len(jobs) > 1:
            raise InvalidRequest(
                "request_id", f"{request_id!r} names {len(jobs)} requests, allowed is one"
            )
        for job in jobs:
            job.cancel()
        return bool(jobs)

    def describe(self) -> dict[str, Any]:
        """What this engine serves: all that a client needs to make requests that it takes."""
        limits, manifest = self.limits, self._manifest
        named = ("modes", "samplers", "controlnets", "loras", "variants", "size_fields")
        return {
            "name": manifest.name,
            "family": manifest.family,
            "precision": manifest.precision,
            "engine": manifest.sha256[:12],
            **{name: list(getattr(limits, name)) for name in named},
            "limits": {**manifest.limits, "max_queue_size": self._config.max_queue_size},
            "output_formats": list(OUTPUT_FORMATS),
            "safety_checker": self._config.safety_checker,
        }

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
        with self._changed:
            self._scheduler.remove(s for s in samples if s.job.is_over or s.is_finished)
            self._report_positions()
            self._record_load()
        self._developer.submit([s for s in started if s.is_finished and not s.job.is_over])

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
        # More steps would only make the heap of undecoded pictures larger, which counts nowhere.
        return self._scheduler.has_work and self._developer.backlog < self._max_batch_size

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify()

    def _samples_of(self, job: Job) -> list[Sample]:
        request, manifest = job.request, self._manifest
        texts = {"prompt": request.prompt, "negative_prompt": request.negative_prompt or ""}
        for field, text in texts.items():
            try:
                self._prompts.validate(text)
            except ValueError as error:
                raise InvalidRequest(field, str(error)) from None
        job.notes += self._prompts.truncation_notes(request.max_embeddings_multiples, **texts)
        try:
            table = self._samplers.table(
                request.sampler,
                request.num_inference_steps,
                request.eta,
                request.timestep_spacing,
                strength=None if request.start is None else request.start.strength,
                denoising_start=request.denoising_start,
                denoising_end=request.denoising_end,
            )
        except BadChoice as error:
            raise InvalidRequest(error.field, error.problem) from None
        if manifest.denoiser.extra_channels and request.start and request.start.latents is not None:
            raise InvalidRequest("image", "latents, but this checkpoint must be shown a picture")
        network = self._denoiser.network_of(self._replaced(request))
        group = Group(network, self._shape_of(request.width, request.height))
        is_embedded = bool(manifest.denoiser.guidance_embedding_size)
        guided = range(0) if is_embedded else request.guided_steps(table.num_steps)
        return [
            Sample(job, index, table, group, guided)
            for index in range(request.num_images_per_prompt)
        ]

    def _replaced(self, request: ImageRequest) -> Mapping[str, str]:
        """Which network takes the place of which, for the request's variant."""
        return self._manifest.variants[request.variant] if request.variant else {}

    def _shape_of(self, width: int, height: int) -> Shape:
        factor = self._manifest.vae_scale_factor
        return (self._manifest.latent_channels, height // factor, width // factor)

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
            self._condition(sample)
            canvas = self._developer.prepare(job)
        except EngineError as error:
            job.fail(error)
            return False
        sample.begin(canvas)
        sample.control_images = canvas.controls
        sample.lora_scale = self._lora_scale(job.request)
        sample.is_started = True
        return True

    def _condition(self, sample: Sample) -> None:
        request = sample.job.request
        multiples, replaced = request.max_embeddings_multiples, self._replaced(request)
        sample.conditional = {
            **self._encode(request.prompt, request.clip_skip, multiples, replaced),
            **self._denoiser.sizes(request, is_negative=False),
        }
        if sample.guided_steps:
            sample.unconditional = {
                # As in diffusers, whose clip_skip is the prompt's alone.
                **self._encode(request.negative_prompt, 0, multiples, replaced),
                **self._denoiser.sizes(request, is_negative=True),
            }

    def _lora_scale(self, request: ImageRequest) -> NDArray[np.float32] | None:
        """(K,) of all adapters, None where all would be 0."""
        scales = dict(request.loras)
        if not any(scales.values()):
            return None
        return np.array([scales.get(name, 0.0) for name in self.limits.loras], np.float32)

    def _step(self, samples: list[Sample]) -> None:
        """One UNet call; a failure ends the jobs of the rows it hit and of no others."""
        batch = StepBatch(samples)
        with self._changed:
            self._num_steps += 1
        num_failures = self._networks.num_failures
        start = time.monotonic()
        try:
            outputs = self._denoiser.predict(batch)
        except EngineError as error:
            for sample in samples:
                sample.job.fail(error)
            return
        for sample, failure in batch.apply(outputs):
            sample.job.fail(failure)
        seconds = time.monotonic() - start
        # Who failed has been answered, and hears nothing after that.
        self._reporter.stepped([sample for sample in samples if not sample.job.is_over])
        if self._networks.num_failures == num_failures:
            self._pace.record_step(samples[0].latent_shape, batch.num_rows, seconds)
        self._record(metrics.STEP_SECONDS, seconds, metrics.rows_label(batch.num_rows))
        self._record(metrics.BATCH_ROWS, batch.num_rows)
        self._record(metrics.BATCH_PICTURES, len(samples))

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

    def _encode(
        self, text: str | None, clip_skip: int, multiples: int, replaced: Mapping[str, str]
    ) -> Conditioning:
        num_hits = self._prompts.num_hits
        conditioning = self._prompts.encode(text, clip_skip, multiples, replaced)
        result = "hit" if self._prompts.num_hits > num_hits else "miss"
        self._record(metrics.PROMPT_LOOKUPS, 1, result)
        self._record(metrics.PROMPT_BYTES, self._prompts.num_bytes)
        return conditioning

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
        """Make every network's first calls, and learn what they cost."""
        config, denoiser = self._config, self._denoiser
        self._rehearse()
        shape = self._smallest_shape
        for num_rows in range(1, config.warmup_rows + 1):
            denoiser.predict_blank(num_rows, shape)
            # The first call of a size may cost more than those after it.
            start = time.monotonic()
            denoiser.predict_blank(num_rows, shape)
            self._pace.record_step(shape, num_rows, time.monotonic() - start)
        if config.max_rows is None:
            self._num_rows_at_default_size = rows_that_fit(
                lambda num_rows: denoiser.predict_blank(num_rows, self._default_shape),
                self._max_batch_size,
            )
        self._record(metrics.MAX_ROWS, self._num_rows_at_default_size)

    def _rehearse(self) -> None:
        """Make the first call of every network, and of each by which it will be tried later."""
        networks, manifest, shape = self._networks, self._manifest, self._smallest_shape
        timeout_s = NETWORKS_TIMEOUT_S
        unused = manifest.safety_checker or {}
        needed = [name for name in manifest.networks if name != unused.get("network")]
        networks.wait_until_ready(
            needed if self._safety_checker.mode is SafetyMode.OFF else [*manifest.networks],
            timeout_s,
            lambda: self._is_closing,
        )
        replacements: list[Mapping[str, str]] = [{}, *manifest.variants.values()]
        for replaced in replacements:
            for network, inputs, outputs in self._prompts.probe_calls:
                networks.first_run(replaced.get(network, network), inputs, outputs, timeout_s)
        self._denoiser.rehearse(self._prompts.encode(""), shape, timeout_s)
        for network in dict.fromkeys(map(self._denoiser.network_of, replacements)):
            self._denoiser.rehearse_network(network, shape, timeout_s)
        self._vae.rehearse(shape, timeout_s)
        self._safety_checker.rehearse(timeout_s)

    @property
    def _smallest_shape(self) -> Shape:
        return self._shape_of(self.limits.min_size, self.limits.min_size)


def _limits(manifest: Manifest, samplers: tuple[str, ...]) -> Limits:
    """The manifest's limits, and what follows from the networks that there are."""
    denoiser = manifest.denoiser
    modes: tuple[str, ...] = MODES if manifest.has_encoder else MODES[:1]
    if denoiser.extra_channels:
        modes = ("inpaint",)
    elif "aesthetic_score" in denoiser.time_ids:
        # A refiner, which has learned nothing of the noisiest levels.
        modes = MODES[1:]
    return Limits(
        samplers=samplers,
        **manifest.limits,
        latent_channels=manifest.latent_channels,
        vae_scale_factor=manifest.vae_scale_factor,
        modes=modes,
        size_fields=denoiser.time_ids,
        controlnets=tuple(manifest.controlnets),
        loras=manifest.loras,
        variants=tuple(manifest.variants),
    )
