"""One UNet call: running samples gathered into rows, and the rows' outputs carried back."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from darkroom_engine.errors import NetworkFailed
from darkroom_engine.sample import Conditioning, Sample
from darkroom_engine.solver import NOISE, advance


class StepBatch:
    """The next step of N samples of one latent shape, as R rows.

    Rows 0 to N - 1 are the conditional predictions; guided samples have a second, unconditional
    row after those.
    """

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.samples = samples
        self._guided = [n for n, sample in enumerate(samples) if sample.job.request.is_guided]

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
            name: np.stack([conditioning[name] for conditioning in conditionings])
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
            sample.state = state
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
            scale = np.float32(self.samples[n].job.request.guidance_scale)
            guided[n] = outputs[row] + scale * (outputs[n] - outputs[row])
        return guided
