"""A formula in the place of a denoiser, for tests that compare solvers."""

import numpy as np

CONFIG = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "timestep_spacing": "linspace",
    "steps_offset": 1,
}
"""Stable Diffusion's noise schedule, in the keys of diffusers' schedulers."""
SHAPE = (4, 4, 4)


class ToyUNet:
    """A smooth function of (sample, timestep) in the place of a UNet.

    Like a trained network it predicts an x_0 of the size of data, whatever the noise level, and
    says so in the terms of its prediction type.
    """

    def __init__(self, seed: int, config: dict, alphas_cumprod: np.ndarray) -> None:
        rng = np.random.default_rng(seed)
        self.frequency = rng.normal(size=SHAPE)
        self.bias = rng.normal(size=SHAPE)
        self.alphas_cumprod = alphas_cumprod.astype(np.float64)
        self.prediction_type = config["prediction_type"]

    def __call__(self, sample: np.ndarray, timestep: float) -> np.ndarray:
        alpha_bar = self.alphas_cumprod[int(timestep)]
        alpha, sigma = np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)
        x0 = self.x0(sample, timestep)
        epsilon = (sample - alpha * x0) / sigma
        output = {"epsilon": epsilon, "v_prediction": alpha * epsilon - sigma * x0, "sample": x0}
        return output[self.prediction_type].astype(np.float32)

    def x0(self, sample: np.ndarray, timestep: float) -> np.ndarray:
        """What the output says of x_0."""
        return np.sin(self.frequency * sample + timestep / 300) + 0.3 * self.bias


class ToyTransformer(ToyUNet):
    """The same x_0 as the velocity of a flow, eps - x_0, where alpha is 1 - sigma."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed, {"prediction_type": "flow_prediction"}, np.zeros(0))

    def __call__(self, sample: np.ndarray, timestep: float) -> np.ndarray:
        sigma = timestep / 1000
        return ((sample - self.x0(sample, timestep)) / sigma).astype(np.float32)
