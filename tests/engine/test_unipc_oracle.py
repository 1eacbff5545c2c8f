"""UniPC tables against diffusers' scheduler of the same config, step by step."""

import itertools
from typing import Any

import numpy as np
import pytest
from toy_unet import CONFIG, SHAPE, ToyUNet

from darkroom_engine import solver as solver_module
from darkroom_engine.samplers import Samplers
from darkroom_engine.solver import (
    LAST,
    MAX_ORDER,
    PREDICTION,
    SAMPLE,
    SolverTable,
    advance,
    predicted_x0,
)

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

pytestmark = pytest.mark.torch

NUM_STEPS = (1, 2, 3, 4, 5, 8, 13, 20, 50)
LATE_STARTS = ((2, 1), (3, 1), (4, 2), (5, 4), (8, 1), (8, 5), (8, 6), (20, 13))


class Oracle:
    """A diffusers scheduler that runs in the given precision, and our table for the same run."""

    def __init__(self, config: dict, solver: dict, num_steps: int, begin: int, dtype: Any) -> None:
        scheduler = diffusers.UniPCMultistepScheduler(**config, **solver)
        train_sigmas = ((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod) ** 0.5
        schedule = {key: config[key] for key in ("prediction_type", "timestep_spacing")}
        schedule |= {"train_sigmas": train_sigmas.tolist(), "steps_offset": config["steps_offset"]}
        scheduler.set_timesteps(num_steps)
        # Karras levels can round to equal timesteps, which diffusers looks up by value otherwise.
        scheduler.set_begin_index(begin)
        scheduler.sigmas = scheduler.sigmas.to(dtype)
        strength = None if begin == 0 else (num_steps - begin + 0.5) / num_steps
        samplers = Samplers.from_config(schedule, solver)
        self.table: SolverTable = samplers.table("unipc", num_steps, strength=strength)
        self.scheduler = scheduler
        self.timesteps = scheduler.timesteps[begin:]
        self.dtype = dtype
        noise = np.random.default_rng(num_steps).normal(size=SHAPE)
        self.sample = torch.from_numpy(noise)[None].to(dtype)

    def state(self) -> np.ndarray:
        """The scheduler's state as our stack, (1, NUM_TERMS, C, H, W)."""
        stack = np.zeros((1, solver_module.NUM_TERMS, *SHAPE), self.sample.numpy().dtype)
        stack[:, SAMPLE] = self.sample.numpy()
        if self.scheduler.last_sample is not None:
            stack[:, LAST] = self.scheduler.last_sample.numpy()
        predictions = [m for m in reversed(self.scheduler.model_outputs) if m is not None]
        for k, prediction in enumerate(predictions[:MAX_ORDER]):
            # The slot before these is for the prediction that the step is about to make.
            stack[:, PREDICTION + 1 + k] = prediction.numpy()
        return stack

    def step(self, output: np.ndarray, timestep: Any) -> np.ndarray:
        model_output = torch.from_numpy(output)[None].to(self.dtype)
        self.sample = self.scheduler.step(model_output, timestep, self.sample).prev_sample
        return self.sample[0].numpy()

    def predicted_x0(self) -> np.ndarray:
        """The last step's x_0, which is that of the corrected sample if it works with noise."""
        prediction = self.scheduler.model_outputs[-1][0]
        if self.scheduler.config.predict_x0:
            return prediction.numpy()
        ratio = self.scheduler.sigmas[self.scheduler.step_index - 1]
        alpha, sigma = self.scheduler._sigma_to_alpha_sigma_t(ratio)
        return ((self.scheduler.last_sample[0] - sigma * prediction) / alpha).numpy()


def assert_every_step_follows(config: dict, solver: dict, num_steps: int, begin: int = 0) -> None:
    """From the same float32 state and UNet output, each step ends within 1e-5 of diffusers'."""
    oracle = Oracle(config, solver, num_steps, begin, torch.float32)
    unet = ToyUNet(num_steps, config, oracle.scheduler.alphas_cumprod.numpy())

    np.testing.assert_array_equal(oracle.timesteps.numpy(), oracle.table.timesteps)
    for step, timestep in enumerate(oracle.timesteps):
        state = oracle.state()
        output = unet(oracle.sample[0].numpy(), float(timestep))
        expected = oracle.step(output, timestep)
        state = advance(state, output[None], [oracle.table], [step])[0]

        # Where a variant makes samples larger than data, float32 has fewer decimals to agree in.
        tolerance = 1e-5 * max(1.0, np.abs(expected).max())
        worst = np.abs(expected - state[SAMPLE]).max()
        assert worst <= tolerance, f"step {step} of {num_steps}: {worst:.2e} > {tolerance:.2e}"


def assert_whole_run_follows(config: dict, solver: dict, num_steps: int, begin: int = 0) -> None:
    """In float64, where rounding cannot hide an error, a whole run ends where diffusers' ends."""
    oracle = Oracle(config, solver, num_steps, begin, torch.float64)
    unet = ToyUNet(num_steps, config, oracle.scheduler.alphas_cumprod.numpy())
    states = oracle.state()
    for step, timestep in enumerate(oracle.timesteps):
        output = unet(oracle.sample[0].numpy(), float(timestep))
        expected = oracle.step(output, timestep)
        states = advance(states, output[None].astype(np.float64), [oracle.table], [step])
        x0 = oracle.predicted_x0()
        worst = np.abs(x0 - predicted_x0(states[0], oracle.table, step)).max()
        assert worst <= 1e-7 * max(1.0, np.abs(x0).max()), f"x_0 at step {step} of {num_steps}"

    assert np.abs(expected - states[0, SAMPLE]).max() <= 1e-8


SOLVERS = [
    {
        "solver_order": order,
        "solver_type": solver_type,
        "predict_x0": predict_x0,
        "lower_order_final": lower_order_final,
        "use_karras_sigmas": karras,
        # diffusers gives NaN at noise level zero unless it is bh2 for x0, ending in order 1.
        "final_sigmas_type": (
            "zero" if solver_type == "bh2" and lower_order_final and predict_x0 else "sigma_min"
        ),
    }
    for order, solver_type, predict_x0, lower_order_final, karras in itertools.product(
        (1, 2, 3), ("bh1", "bh2"), (True, False), (True, False), (False, True)
    )
    # Karras levels that end in sigma_min repeat their last level: a step of length zero, for which
    # order 3 has no solution.
    if not (order == 3 and karras and not lower_order_final)
]


def name(solver: dict) -> str:
    return "-".join(
        [
            solver["solver_type"],
            f"order{solver['solver_order']}",
            "x0" if solver["predict_x0"] else "noise",
            "karras" if solver["use_karras_sigmas"] else "beta",
            "lower_final" if solver["lower_order_final"] else "full_final",
        ]
    )


@pytest.mark.parametrize("solver", SOLVERS, ids=name)
def test_every_variant_follows_diffusers_wherever_it_begins(solver: dict) -> None:
    for num_steps in NUM_STEPS:
        assert_every_step_follows(CONFIG, solver, num_steps)
        assert_whole_run_follows(CONFIG, solver, num_steps)
    for num_steps, begin in LATE_STARTS:
        assert_every_step_follows(CONFIG, solver, num_steps, begin)
        assert_whole_run_follows(CONFIG, solver, num_steps, begin)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("predict_x0", [True, False])
def test_every_spacing_and_prediction_type_follows_diffusers(
    prediction_type: str, spacing: str, predict_x0: bool
) -> None:
    config = CONFIG | {"timestep_spacing": spacing, "prediction_type": prediction_type}
    final = "zero" if predict_x0 else "sigma_min"
    solver = {"predict_x0": predict_x0, "final_sigmas_type": final}
    for num_steps in NUM_STEPS:
        assert_every_step_follows(config, solver, num_steps)
        assert_whole_run_follows(config, solver, num_steps)


def test_disabled_corrector_steps_follow_diffusers() -> None:
    """A step is counted from the first of the whole, wherever a run begins."""
    solver = {"disable_corrector": [0, 3]}
    for num_steps, begin in (*((num_steps, 0) for num_steps in NUM_STEPS), *LATE_STARTS, (8, 2)):
        assert_every_step_follows(CONFIG, solver, num_steps, begin)
        assert_whole_run_follows(CONFIG, solver, num_steps, begin)


def test_the_linear_beta_schedule_follows_diffusers() -> None:
    for num_steps in NUM_STEPS:
        assert_every_step_follows(CONFIG | {"beta_schedule": "linear"}, {}, num_steps)


def test_zero_terminal_snr_follows_diffusers() -> None:
    config = CONFIG | {
        "rescale_betas_zero_snr": True,
        "prediction_type": "v_prediction",
        "timestep_spacing": "trailing",
    }
    for num_steps in NUM_STEPS:
        assert_every_step_follows(config, {}, num_steps)
