"""The other samplers' tables against diffusers' schedulers, step by step."""

from typing import Any

import numpy as np
import pytest
from toy_unet import CONFIG, SHAPE, ToyUNet

from darkroom_engine.noise import GaussianNoise
from darkroom_engine.samplers import Samplers
from darkroom_engine.solver import NOISE, SAMPLE, advance, initial_state

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
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "lcm": ("LCMScheduler", {"clip_sample": False}),
}
VARIANCE_EXPLODING = ("euler", "euler_ancestral")
"""Samplers whose diffusers sample is x / alpha."""


def assert_follows(name: str, config: dict[str, Any], num_steps: int) -> None:
    """Fed the same UNet outputs and drawing from equal streams, both go the same way.

    The tolerance is for the rounding of whole runs in float32, on both sides.
    """
    class_name, options = SCHEDULERS[name]
    accepted = {key: config[key] for key in config if name != "lcm" or key != "timestep_spacing"}
    scheduler = getattr(diffusers, class_name)(**accepted, **options)
    scheduler.set_timesteps(num_steps)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    train_sigmas = ((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod) ** 0.5
    schedule = {key: config[key] for key in ("prediction_type", "timestep_spacing", "steps_offset")}
    schedule["train_sigmas"] = train_sigmas.tolist()
    schedule["set_alpha_to_one"] = config.get("set_alpha_to_one", True)
    table = Samplers.from_config(schedule, {}).table(name, num_steps)
    np.testing.assert_allclose(table.timesteps, scheduler.timesteps.numpy(), atol=1e-4)

    stream = GaussianNoise(SEED)
    states = initial_state(stream.draw(SHAPE), table)[None]
    generator = torch.Generator("cpu").manual_seed(SEED)
    expected = torch.randn(SHAPE, generator=generator)[None] * scheduler.init_noise_sigma
    unet = ToyUNet(num_steps, config, scheduler.alphas_cumprod.numpy())
    draws = {} if name == "euler" else {"generator": generator}
    for step, timestep in enumerate(scheduler.timesteps):
        # What the UNet is given, which is in the scale of our samples.
        given = scheduler.scale_model_input(expected, timestep)[0].numpy()
        output = unet(given, float(timestep))
        stepped = scheduler.step(torch.from_numpy(output)[None], timestep, expected, **draws)
        expected = stepped.prev_sample
        if table.is_stochastic and not (name == "lcm" and step == num_steps - 1):
            states[:, NOISE] = stream.draw(SHAPE)
        states = advance(states, output[None], [table], [step])

        actual = states[0, SAMPLE]
        theirs = expected[0].numpy()
        if name in VARIANCE_EXPLODING:
            theirs = theirs / np.sqrt(1 + float(scheduler.sigmas[step + 1]) ** 2)
        tolerance = 5e-5 * max(1.0, np.abs(theirs).max())
        worst = np.abs(theirs - actual).max()
        assert worst <= tolerance, f"step {step} of {num_steps}: {worst:.2e} > {tolerance:.2e}"


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_sampler_follows_diffusers_at_every_step_count(name: str, spacing: str) -> None:
    for num_steps in range(1, 51):
        assert_follows(name, CONFIG | {"timestep_spacing": spacing}, num_steps)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_sampler_follows_diffusers_with_v_prediction(name: str) -> None:
    for num_steps in (1, 2, 5, 20):
        assert_follows(name, CONFIG | {"prediction_type": "v_prediction"}, num_steps)


def test_ddim_ends_where_the_checkpoint_says() -> None:
    for num_steps in (1, 2, 5, 20):
        config = CONFIG | {"set_alpha_to_one": False, "timestep_spacing": "leading"}
        assert_follows("ddim", config, num_steps)
