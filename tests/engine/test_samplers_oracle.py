"""The other samplers' tables against diffusers' schedulers, step by step."""

from typing import Any

import numpy as np
import pytest
from toy_unet import CONFIG, SHAPE, ToyUNet

from darkroom_engine.noise import GaussianNoise
from darkroom_engine.samplers import Samplers
from darkroom_engine.solver import NOISE, SAMPLE, advance, initial_state, predicted_x0

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

pytestmark = pytest.mark.torch

SEED = 11

KARRAS = {"use_karras_sigmas": True}
SDE = {"algorithm_type": "sde-dpmsolver++"}
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}),
    "dpmpp_2m_karras": ("DPMSolverMultistepScheduler", KARRAS),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", SDE),
    "dpmpp_2m_sde_karras": ("DPMSolverMultistepScheduler", SDE | KARRAS),
    "dpmpp_sde": ("DPMSolverSinglestepScheduler", SDE),
    "dpmpp_sde_karras": ("DPMSolverSinglestepScheduler", SDE | KARRAS),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "lcm": ("LCMScheduler", {"clip_sample": False}),
    "tcd": ("TCDScheduler", {"clip_sample": False}),
}
SPACED = ("dpmpp_2m", "dpmpp_2m_sde", "euler", "euler_ancestral", "ddim")
"""Samplers whose timesteps are spaced by the checkpoint or the request; others have their own."""
SPACINGS = ("linspace", "leading", "trailing")
VARIANCE_EXPLODING = ("euler", "euler_ancestral")
"""Samplers whose diffusers sample is x / alpha."""


def samplers_of(scheduler: Any, config: dict[str, Any]) -> Samplers:
    """Our samplers for a checkpoint with the config that the scheduler was made of."""
    train_sigmas = ((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod) ** 0.5
    schedule = {key: config[key] for key in ("prediction_type", "timestep_spacing", "steps_offset")}
    schedule["train_sigmas"] = train_sigmas.tolist()
    schedule["set_alpha_to_one"] = config.get("set_alpha_to_one", True)
    return Samplers.from_config(schedule, {})


def predicted_by(scheduler: Any, stepped: Any) -> Any:
    """The x_0 of diffusers' last step, or None where it does not tell."""
    if hasattr(scheduler, "model_outputs"):
        return scheduler.model_outputs[-1]
    return getattr(stepped, "pred_original_sample", None)


def assert_follows(
    name: str,
    config: dict[str, Any],
    num_steps: int,
    eta: float | None = None,
    spacing: str | None = None,
) -> None:
    """Fed the same UNet outputs and drawing from equal streams, both go the same way.

    The tolerance is for the rounding of whole runs in float32, on both sides.
    """
    class_name, options = SCHEDULERS[name]
    chosen = options if spacing is None else options | {"timestep_spacing": spacing}
    scheduler = getattr(diffusers, class_name).from_config(config, **chosen)
    scheduler.set_timesteps(num_steps)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    table = samplers_of(scheduler, config).table(name, num_steps, eta, spacing)
    np.testing.assert_allclose(table.timesteps, scheduler.timesteps.numpy(), atol=1e-4)

    stream = GaussianNoise(SEED)
    states = initial_state(stream.draw(SHAPE), table)[None]
    generator = torch.Generator("cpu").manual_seed(SEED)
    expected = torch.randn(SHAPE, generator=generator)[None] * scheduler.init_noise_sigma
    unet = ToyUNet(num_steps, config, scheduler.alphas_cumprod.numpy())
    draws = {} if name == "euler" else {"generator": generator}
    draws |= {} if eta is None else {"eta": eta}
    for step, timestep in enumerate(scheduler.timesteps):
        # What the UNet is given, which is in the scale of our samples.
        given = scheduler.scale_model_input(expected, timestep)[0].numpy()
        output = unet(given, float(timestep))
        stepped = scheduler.step(torch.from_numpy(output)[None], timestep, expected, **draws)
        expected = stepped.prev_sample
        if table.is_stochastic:
            # Where diffusers draws nothing at the last step, this is noise of weight zero.
            states[:, NOISE] = stream.draw(SHAPE)
        states = advance(states, output[None], [table], [step])

        theirs = expected[0].numpy()
        if name in VARIANCE_EXPLODING:
            theirs = theirs / np.sqrt(1 + float(scheduler.sigmas[step + 1]) ** 2)
        assert_near(theirs, states[0, SAMPLE], f"step {step} of {num_steps}")
        x0 = predicted_by(scheduler, stepped)
        their_x0 = unet.x0(given, float(timestep)) if x0 is None else x0[0].numpy()
        assert_near(their_x0, predicted_x0(states[0], table, step), f"x_0 {step} of {num_steps}")


def assert_near(expected: np.ndarray, actual: np.ndarray, what: str) -> None:
    tolerance = 5e-5 * max(1.0, np.abs(expected).max())
    worst = np.abs(expected - actual).max()
    assert worst <= tolerance, f"{what}: {worst:.2e} > {tolerance:.2e}"


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", SPACED)
def test_every_spacing_follows_diffusers_at_every_step_count(name: str, spacing: str) -> None:
    """What a request chooses does what `from_config(config, timestep_spacing=...)` does."""
    for num_steps in range(1, 51):
        assert_follows(name, CONFIG, num_steps, spacing=spacing)


@pytest.mark.parametrize("name", sorted(SCHEDULERS.keys() - SPACED))
def test_samplers_with_timesteps_of_their_own_follow_diffusers(name: str) -> None:
    """Whatever the checkpoint's spacing, which diffusers ignores, too."""
    for num_steps in range(1, 51):
        spacing = SPACINGS[num_steps % len(SPACINGS)]
        assert_follows(name, CONFIG | {"timestep_spacing": spacing}, num_steps)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_ddim_adds_as_much_noise_as_diffusers(eta: float, spacing: str) -> None:
    for num_steps in range(1, 51):
        assert_follows("ddim", CONFIG, num_steps, eta=eta, spacing=spacing)


# With 9 / 11 the timestep that a step denoises to is nearly a whole number, and rounding decides.
@pytest.mark.parametrize("eta", [0.0, 0.1, 0.5, 9 / 11, 1.0])
def test_tcd_adds_as_much_noise_as_diffusers(eta: float) -> None:
    for num_steps in range(1, 51):
        assert_follows("tcd", CONFIG, num_steps, eta=eta)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_sampler_follows_diffusers_with_v_prediction(name: str) -> None:
    for num_steps in (1, 2, 5, 20):
        assert_follows(name, CONFIG | {"prediction_type": "v_prediction"}, num_steps)


# diffusers' EulerAncestralDiscreteScheduler has no such prediction type.
@pytest.mark.parametrize("name", sorted(SCHEDULERS.keys() - {"euler_ancestral"}))
def test_every_sampler_follows_diffusers_with_x0_prediction(name: str) -> None:
    for num_steps in (1, 2, 5, 20):
        assert_follows(name, CONFIG | {"prediction_type": "sample"}, num_steps)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", SPACED)
def test_the_checkpoints_own_spacing_follows_diffusers(name: str, spacing: str) -> None:
    for num_steps in (1, 2, 5, 20):
        assert_follows(name, CONFIG | {"timestep_spacing": spacing}, num_steps)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_ends_where_the_checkpoint_says(eta: float) -> None:
    for num_steps in (1, 2, 5, 20):
        config = CONFIG | {"set_alpha_to_one": False, "timestep_spacing": "leading"}
        assert_follows("ddim", config, num_steps, eta=eta)
