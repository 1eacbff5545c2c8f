"""One call of the denoiser: running samples gathered into rows, and its outputs carried back."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from darkroom_engine.arrays import Array, Arrays
from darkroom_engine.errors import NetworkFailed
from darkroom_engine.networks import Conditioning
from darkroom_engine.sample import Sample
from darkroom_engine.solver import NOISE, advance_by, step_weights


@dataclass(frozen=True)
class Row:
    """A row of a call: a sample, and what the denoiser is told with it."""

    sample: Sample
    conditioning: Conditioning


class Progress(NamedTuple):
    """A step that a sample has made."""

    sample: Sample
    step: int
    """Steps done, this one among them."""
    state: Array
    """(NUM_TERMS, C, h, w) after it."""


class StepBatch:
    """The next step of N samples of one group, as R rows.

    The samples that are guided at this step come first. Rows 0 to N - 1 are the conditional
    predictions; rows N to R - 1 the unconditional ones, of those that are guided.
    """

    def __init__(self, samples: Sequence[Sample], arrays: Arrays) -> None:
        guided = [sample for sample in samples if sample.is_guided]
        self.samples = [*guided, *(sample for sample in samples if not sample.is_guided)]
        self.rows = [Row(sample, sample.conditional) for sample in self.samples]
        self.rows += [Row(sample, sample.unconditional) for sample in guided]
        self.made: list[Progress] = []
        """What `apply` has begun; a sample may be further on by now."""
        self._arrays = arrays
        self._finite: Callable[[], NDArray[np.bool_]] = lambda: np.ones(0, bool)

    @property
    def num_rows(self) -> int:
        return len(self.rows)

    def latents(self) -> Array:
        """(R, C, h, w)."""
        return self._arrays.stack([row.sample.latents for row in self.rows])

    def timesteps(self) -> Array:
        """(R,)."""
        timesteps = np.array([row.sample.timestep for row in self.rows], np.float32)
        return self._arrays.from_host(timesteps)

    def apply(self, outputs: Array) -> None:
        """Advance every sample by its own step, which may be under way when this returns.

        Args:
            outputs: (R, C, h, w) from the denoiser.
        """
        arrays, samples = self._arrays, self.samples
        for sample in samples:
            if sample.table.is_stochastic:
                # From the sample's own stream, so that its neighbours have no say in it.
                sample.state[NOISE] = arrays.from_host(sample.noise.draw(sample.latent_shape))
        weights = step_weights([s.table for s in samples], [s.step for s in samples], np.float32)
        guided = self._guide(outputs)
        states = advance_by(
            arrays.stack([sample.state for sample in samples]),
            guided,
            *map(arrays.from_host, weights),
        )
        self._finite = arrays.fetch(arrays.finite_rows(guided))
        for sample, state in zip(samples, states, strict=True):
            # A copy, because a view would keep the whole batch for as long as one of it waits.
            sample.state = arrays.copy(state)
            sample.step += 1
            if sample.kept is not None:
                sample.kept.put_back(sample)
            if sample.is_finished:
                sample.result = arrays.fetch(sample.latents)
            self.made.append(Progress(sample, sample.step, sample.state))

    def failures(self) -> list[tuple[Sample, NetworkFailed]]:
        """Wait for the step; the samples whose output is not finite, which must not go on."""
        failed = []
        for (sample, step, _), is_finite in zip(self.made, self._finite(), strict=True):
            if not is_finite:
                problem = f"output is not finite at step {step} of {sample.table.num_steps}"
                failed.append((sample, NetworkFailed(sample.group.network, problem)))
        return failed

    def _guide(self, outputs: Array) -> Array:
        """Classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598): (N, C, h, w)."""
        conditional, unconditional = outputs[: len(self.samples)], outputs[len(self.samples) :]
        guided = self._arrays.copy(conditional)
        requests = [sample.job.request for sample in self.samples[: len(unconditional)]]
        if not requests:
            return guided
        scales = np.array([request.guidance_scale for request in requests], np.float32)
        difference = conditional[: len(requests)] - unconditional
        scale = self._arrays.from_host(scales[:, None, None, None])
        guided[: len(requests)] = unconditional + scale * difference
        for n, request in enumerate(requests):
            if phi := request.guidance_rescale:
                guided[n] = self._rescale(guided[n], conditional[n], phi)
        return guided

    def _rescale(self, guided: Array, conditional: Array, phi: float) -> Array:
        """Equations 15 and 16 of Lin et al. 2023 (arXiv:2305.08891), against too much contrast."""
        contrast = self._arrays.std(conditional) / self._arrays.std(guided)
        return phi * (guided * contrast) + (1 - phi) * guided


def stack_conditioning(rows: Sequence[Conditioning], arrays: Arrays) -> Conditioning:
    """The rows' inputs, each (R, ...)."""
    return {name: _stack([row[name] for row in rows], arrays) for name in rows[0]}


def _stack(rows: Sequence[Array], arrays: Arrays) -> Array:
    """Rows (L_n, ...) to (R, L, ...), where those of shorter prompts are repeated to fit.

    Attention over a text that is written twice is attention over the text: every weight is halved
    and counted twice. So prompts of any lengths share a call, without a mask.
    """
    length = math.lcm(*{len(row) for row in rows})
    # Mostly all are as long as each other, and need not be copied first.
    return arrays.stack(
        [
            row if len(row) == length else arrays.concatenate([row] * (length // len(row)), axis=0)
            for row in rows
        ]
    )
