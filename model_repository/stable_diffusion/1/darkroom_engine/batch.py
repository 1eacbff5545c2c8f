"""One UNet call: running samples gathered into rows, and the rows' outputs carried back."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from darkroom_engine.errors import NetworkFailed
from darkroom_engine.networks import Conditioning
from darkroom_engine.sample import Sample
from darkroom_engine.solver import NOISE, advance


@dataclass(frozen=True)
class Row:
    """A row of a call: a sample, and what the denoiser is told with it."""

    sample: Sample
    conditioning: Conditioning


class StepBatch:
    """The next step of N samples of one group, as R rows.

    Rows 0 to N - 1 are the conditional predictions; samples that are guided at this step have a
    second, unconditional row after those.
    """

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.samples = samples
        self._guided = [n for n, sample in enumerate(samples) if sample.is_guided]
        self.rows = [Row(sample, sample.conditional) for sample in samples]
        self.rows += [Row(samples[n], samples[n].unconditional) for n in self._guided]

    @property
    def num_rows(self) -> int:
        return len(self.rows)

    def latents(self) -> NDArray[np.float32]:
        """(R, C, h, w)."""
        return np.stack([row.sample.latents for row in self.rows])

    def timesteps(self) -> NDArray[np.float32]:
        """(R,)."""
        return np.array([row.sample.timestep for row in self.rows], np.float32)

    def apply(self, outputs: NDArray[np.float32]) -> list[tuple[Sample, NetworkFailed]]:
        """Advance every sample by its own step.

        Args:
            outputs: (R, C, H, W) from the UNet.

        Returns:
            The samples whose output is not finite, which must not go on, with the error.
        """
        samples = self.samples
        for sample in samples:
            if sample.table.is_stochastic:
                # From the sample's own stream, so that its neighbours have no say in it.
                sample.state[NOISE] = sample.noise.draw(sample.latent_shape)
        states = np.stack([sample.state for sample in samples])
        guided = self._guide(outputs)
        states = advance(
            states, guided, [sample.table for sample in samples], [s.step for s in samples]
        )
        failed = []
        for sample, output, state in zip(samples, guided, states, strict=True):
            # A copy, because a view would keep the whole batch for as long as one of it waits.
            sample.state = state.copy()
            sample.step += 1
            if sample.kept is not None:
                sample.kept.put_back(sample)
            if not np.isfinite(output).all():
                problem = f"output is not finite at step {sample.step} of {sample.table.num_steps}"
                failed.append((sample, NetworkFailed(sample.group.network, problem)))
        return failed

    def _guide(self, outputs: NDArray[np.float32]) -> NDArray[np.float32]:
        """Classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598): (N, C, H, W)."""
        count = len(self.samples)
        guided = outputs[:count].copy()
        for row, n in enumerate(self._guided, start=count):
            request = self.samples[n].job.request
            scale = np.float32(request.guidance_scale)
            guided[n] = outputs[row] + scale * (outputs[n] - outputs[row])
            if request.guidance_rescale:
                guided[n] = _rescale(guided[n], outputs[n], np.float32(request.guidance_rescale))
        return guided


def _rescale(
    guided: NDArray[np.float32], conditional: NDArray[np.float32], phi: np.float32
) -> NDArray[np.float32]:
    """Equations 15 and 16 of Lin et al. 2023 (arXiv:2305.08891), against too much contrast."""
    rescaled = guided * (conditional.std(ddof=1) / guided.std(ddof=1))
    mixed: NDArray[np.float32] = phi * rescaled + (1 - phi) * guided
    return mixed


def stack_conditioning(rows: Sequence[Conditioning]) -> Conditioning:
    """The rows' inputs, each (R, ...)."""
    return {name: _stack([row[name] for row in rows]) for name in rows[0]}


def _stack(rows: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    """Rows (L_n, ...) to (R, L, ...), where those of shorter prompts are repeated to fit.

    Attention over a text that is written twice is attention over the text: every weight is halved
    and counted twice. So prompts of any lengths share a call, without a mask.
    """
    length = math.lcm(*{len(row) for row in rows})
    # Mostly all are as long as each other, and need not be copied first.
    return np.stack(
        [
            row if len(row) == length else np.concatenate([row] * (length // len(row)))
            for row in rows
        ]
    )
