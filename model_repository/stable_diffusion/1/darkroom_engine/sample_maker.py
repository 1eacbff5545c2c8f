"""From requests to samples: what each picture is told, and where it begins."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from darkroom_engine import metrics
from darkroom_engine.arrays import Arrays
from darkroom_engine.canvas import Canvas
from darkroom_engine.denoiser import Denoiser
from darkroom_engine.errors import InvalidRequest
from darkroom_engine.job import Job
from darkroom_engine.manifest import Manifest
from darkroom_engine.metrics import Record
from darkroom_engine.networks import Conditioning, Shape
from darkroom_engine.prompts import PromptEncoder
from darkroom_engine.request import ImageRequest
from darkroom_engine.sample import Group, Sample
from darkroom_engine.samplers import BadChoice, Samplers


class SampleMaker:
    """Makes the samples of a job, and readies each of them for its first step."""

    def __init__(
        self,
        manifest: Manifest,
        samplers: Samplers,
        prompts: PromptEncoder,
        denoiser: Denoiser,
        *,
        arrays: Arrays,
        record: Record,
    ) -> None:
        self._manifest = manifest
        self._samplers = samplers
        self._prompts = prompts
        self._denoiser = denoiser
        self._arrays = arrays
        self._record = record

    def shape_of(self, width: int, height: int) -> Shape:
        """Of the latents of a picture of so many pixels."""
        factor = self._manifest.vae_scale_factor
        return (self._manifest.latent_channels, height // factor, width // factor)

    def samples_of(self, job: Job) -> list[Sample]:
        """One for each picture; notes for whoever asked are added to the job.

        Raises:
            InvalidRequest: the checkpoint cannot do what the request says.
        """
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
        group = Group(network, self.shape_of(request.width, request.height))
        is_embedded = bool(manifest.denoiser.guidance_embedding_size)
        guided = range(0) if is_embedded else request.guided_steps(table.num_steps)
        return [
            Sample(job, index, table, group, guided)
            for index in range(request.num_images_per_prompt)
        ]

    def _replaced(self, request: ImageRequest) -> Mapping[str, str]:
        """Which network takes the place of which, for the request's variant."""
        return self._manifest.variants[request.variant] if request.variant else {}

    def ready(self, sample: Sample, canvas: Canvas) -> None:
        """Give a sample its conditioning, and begin it on what its request starts from.

        Raises:
            NetworkFailed: a text encoder failed.
        """
        self._condition(sample)
        sample.begin(canvas, self._arrays)
        sample.lora_scale = self._lora_scale(sample.job.request)
        sample.is_started = True

    def _condition(self, sample: Sample) -> None:
        request = sample.job.request
        multiples, replaced = request.max_embeddings_multiples, self._replaced(request)
        conditional = {
            **self._encode(request.prompt, request.clip_skip, multiples, replaced),
            **self._denoiser.sizes(request, is_negative=False),
        }
        sample.conditional = self._moved(conditional)
        if sample.guided_steps:
            unconditional = {
                # As in diffusers, whose clip_skip is the prompt's alone.
                **self._encode(request.negative_prompt, 0, multiples, replaced),
                **self._denoiser.sizes(request, is_negative=True),
            }
            sample.unconditional = self._moved(unconditional)

    def _moved(self, conditioning: Conditioning) -> Conditioning:
        """To where the batch is."""
        return {name: self._arrays.from_host(row) for name, row in conditioning.items()}

    def _lora_scale(self, request: ImageRequest) -> NDArray[np.float32] | None:
        """(K,) of all adapters, None where all would be 0."""
        scales = dict(request.loras)
        if not any(scales.values()):
            return None
        return np.array([scales.get(name, 0.0) for name in self._manifest.loras], np.float32)

    def _encode(
        self, text: str | None, clip_skip: int, multiples: int, replaced: Mapping[str, str]
    ) -> Conditioning:
        num_hits = self._prompts.num_hits
        conditioning = self._prompts.encode(text, clip_skip, multiples, replaced)
        result = "hit" if self._prompts.num_hits > num_hits else "miss"
        self._record(metrics.PROMPT_LOOKUPS, 1, result)
        self._record(metrics.PROMPT_BYTES, self._prompts.num_bytes)
        return conditioning
