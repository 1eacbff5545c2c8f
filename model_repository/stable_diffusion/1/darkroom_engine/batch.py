"""One UNet call: running samples gathered into rows, and the rows' outputs carried back."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from darkroom_engine.errors import NetworkFailed
from darkroom_engine.sample import Conditioning, Sample
from darkroom_engine.solver import NOISE, advance


class StepBatch:
    """The next step of N samples of one latent shape, as R rows.

    Rows 0 to N - 1 are the conditional predictions; samples that are guided at this step have a
    second, unconditional row after those.
    """

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.samples = samples
        self._guided = [n for n, sample in enumerate(samples) if sample.is_guided]

    @property
    def num_rows(self) -> int:
        return len(self.samples) + len(self._guided)

    def inputs(self) -> tuple[NDArray[np.float32], NDArray[np.float32], Conditioning]:
        """Sample (R, C, H, W), timestep (R,) and the conditioning inputs, each (R, ...)."""
        samples = self.samples
        row_owners = [*samples, *(samples[n] for n in self._guided)]
        latents = np.stack([sample.latents for sample in row_owners])
        timesteps = np.array([sample.timestep for sample in row_owners], np.float32)
        conditionings = [sample.conditional for sample in samples]
        conditionings += [samples[n].unconditional for n in self._guided]
        stacked = {
            name: _stack([conditioning[name] for conditioning in conditionings])
            for name in conditionings[0]
        }
        return latents, timesteps, stacked

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
            if not np.isfinite(output).all():
                problem = f"output is not finite at step {sample.step} of {sample.table.num_steps}"
                failed.append((sample, NetworkFailed("unet", problem)))
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
