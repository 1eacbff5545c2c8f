"""One picture in the making."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from darkroom_engine.arrays import Array, Arrays
from darkroom_engine.canvas import Canvas
from darkroom_engine.job import Job
from darkroom_engine.networks import Conditioning, Shape
from darkroom_engine.noise import GaussianNoise
from darkroom_engine.solver import SAMPLE, SolverTable, initial_state
from darkroom_engine.vae import Posterior


@dataclass(frozen=True)
class Group:
    """All that two samples must share to share a call of the denoiser."""

    network: str
    shape: Shape


@dataclass(eq=False, repr=False)
class Sample:
    """The mutable state of one picture between two steps."""

    job: Job
    index: int
    """Which of the request's pictures."""
    table: SolverTable
    group: Group
    guided_steps: range
    """The steps, counted from 0, at which classifier-free guidance is on."""
    step: int = 0
    """Steps done."""
    is_started: bool = False
    """Whether the engine has set the rest, which it does before the first step."""
    noise: GaussianNoise = field(init=False)
    state: Array = field(init=False)
    """(NUM_TERMS, C, h, w); this and what follows lie where the batch does."""
    conditional: Conditioning = field(init=False)
    unconditional: Conditioning = field(init=False)
    result: Callable[[], NDArray[np.float32]] = field(init=False)
    """Set with the last step: waits for the latents, (C, h, w), on the host."""
    extra_channels: Array | None = None
    """(C', h, w) that the denoiser takes after the latents: a mask, and what it leaves."""
    kept: "KeptParts | None" = None
    """What of the starting picture is to stay as it is."""
    control_images: tuple[Array, ...] = ()
    """(3, H, W) for each ControlNet of the request."""
    lora_scale: NDArray[np.float32] | None = None
    """(K,) of all adapters, on the host; None if it uses none."""

    @property
    def latent_shape(self) -> Shape:
        return self.group.shape

    def begin(self, canvas: Canvas, arrays: Arrays) -> None:
        """Draw its noise, and set what it starts with.

        The order of the draws is that of diffusers' pipelines, so that a seed means the same
        picture there and here: first for the latents of the starting picture, of which the VAE's
        encoder gives a distribution, then for the noise on them, then for those of the picture
        without what is to be made.
        """
        self.noise = GaussianNoise(self.seed)
        self.state = arrays.from_host(self._begin(canvas, arrays))
        self.control_images = tuple(map(arrays.from_host, canvas.controls))

    def _begin(self, canvas: Canvas, arrays: Arrays) -> NDArray[np.float32]:
        """The state, on the host, before the first step."""
        request, table = self.job.request, self.table
        start = request.start
        if start is None or canvas.image is None:
            return initial_state(self._draw(), table)
        # What was left half done goes on as it is.
        adds_noise = request.denoising_start is None
        is_noise_alone = canvas.mask is not None and start.strength == 1 and adds_noise
        image = noise = np.zeros(self.latent_shape, np.float32)
        if not (is_noise_alone and canvas.masked is not None):
            image = self._drawn(canvas.image)
        if adds_noise or canvas.mask is not None:
            noise = self._draw()
        state = initial_state(noise, table)
        if not adds_noise:
            state[SAMPLE] = image
        elif not is_noise_alone:
            alpha, sigma = table.levels[0].astype(np.float32)
            state[SAMPLE] = alpha * image + sigma * noise
        if canvas.mask is None:
            return state
        if isinstance(canvas.image, Posterior):
            # diffusers draws these in any case.
            masked_noise = self._draw()
            if canvas.masked is not None:
                masked = canvas.masked.draw(masked_noise)
                self.extra_channels = arrays.from_host(np.concatenate([canvas.mask, masked]))
                return state
        self.kept = KeptParts(*map(arrays.from_host, (canvas.mask, image, noise)))
        return state

    @property
    def seed(self) -> int:
        return self.job.request.seed + self.index

    @property
    def is_guided(self) -> bool:
        """Whether the next step takes the unconditional prediction too."""
        return self.step in self.guided_steps

    @property
    def num_rows(self) -> int:
        """Rows that the next step takes."""
        return 2 if self.is_guided else 1

    @property
    def num_row_steps(self) -> int:
        """Rows of all steps that are left."""
        guided = self.guided_steps
        first = max(guided.start, self.step)
        return self.num_steps_left + max(0, guided.stop - first)

    @property
    def num_steps_left(self) -> int:
        return self.table.num_steps - self.step

    @property
    def active_controls(self) -> list[int]:
        """Which of the request's ControlNets have a say in the next step, as diffusers counts."""
        first, last = self.step / self.table.num_steps, (self.step + 1) / self.table.num_steps
        controls = self.job.request.controls
        return [n for n, it in enumerate(controls) if first >= it.start and last <= it.end]

    @property
    def timestep(self) -> float:
        return float(self.table.timesteps[self.step])

    @property
    def is_finished(self) -> bool:
        return self.step == self.table.num_steps

    @property
    def latents(self) -> Array:
        """The current x_t, (C, h, w)."""
        return self.state[SAMPLE]

    def _draw(self) -> NDArray[np.float32]:
        return self.noise.draw(self.latent_shape)

    def _drawn(self, image: Posterior | NDArray[np.float32]) -> NDArray[np.float32]:
        return image.draw(self._draw()) if isinstance(image, Posterior) else image


@dataclass(frozen=True)
class KeptParts:
    """The parts of a picture that inpainting leaves alone, at any noise level."""

    mask: Array
    """(1, h, w), 1 where there is something to be made."""
    latents: Array
    noise: Array

    def put_back(self, sample: Sample) -> None:
        """Into the sample after a step, as noisy as the sample is at the next one.

        diffusers' inpainting of checkpoints that were not trained for it.
        """
        alpha, sigma = (1.0, 0.0) if sample.is_finished else sample.table.levels[sample.step]
        noisy = float(alpha) * self.latents + float(sigma) * self.noise
        sample.state[SAMPLE] = (1 - self.mask) * noisy + self.mask * sample.state[SAMPLE]
