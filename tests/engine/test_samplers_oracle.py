"""The samplers' tables against diffusers' schedulers, step by step, and its pipelines' counting.

UniPC's variants have a file of their own; here it is one of the samplers a request may name.
"""

import inspect
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from toy_unet import CONFIG, SHAPE, ToyTransformer, ToyUNet

from darkroom_engine.noise import GaussianNoise
from darkroom_engine.samplers import BadChoice, Samplers
from darkroom_engine.solver import (
    NOISE,
    SAMPLE,
    SolverTable,
    advance,
    initial_state,
    predicted_x0,
)

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

pytestmark = pytest.mark.torch

SEED = 11
STEP_COUNTS = (1, 2, 3, 4, 5, 8, 13, 20, 50)
FEW_STEP_COUNTS = (1, 2, 5, 20)

KARRAS = {"use_karras_sigmas": True}
SDE = {"algorithm_type": "sde-dpmsolver++"}
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "unipc": ("UniPCMultistepScheduler", {}),
    "unipc_karras": ("UniPCMultistepScheduler", KARRAS),
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
SPACED = ("unipc", "dpmpp_2m", "dpmpp_2m_sde", "euler", "euler_ancestral", "ddim")
"""Samplers whose timesteps are spaced by the checkpoint or the request; others have their own."""
SPACINGS = ("linspace", "leading", "trailing")
VARIANCE_EXPLODING = ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler")
"""Schedulers whose sample is x / alpha."""

FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
FLOW_SCHEDULERS: dict[str, tuple[str, dict[str, Any], str]] = {
    "euler": ("FlowMatchEulerDiscreteScheduler", {}, "shift"),
    "unipc": ("UniPCMultistepScheduler", FLOW, "flow_shift"),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", FLOW, "flow_shift"),
}
SHIFTS = (1.0, 1.15, 3.0, 6.0)


def samplers_of(config: dict[str, Any], **options: bool) -> Samplers:
    """Our samplers for a checkpoint of that config, whose sigmas the exporter takes from UniPC."""
    alphas_cumprod = diffusers.UniPCMultistepScheduler.from_config(config).alphas_cumprod
    train_sigmas = ((1 - alphas_cumprod) / alphas_cumprod) ** 0.5
    schedule = {key: config[key] for key in ("prediction_type", "timestep_spacing", "steps_offset")}
    schedule["train_sigmas"] = train_sigmas.tolist()
    schedule["set_alpha_to_one"] = config.get("set_alpha_to_one", True)
    return Samplers.from_config(schedule, {}, **options)


SAMPLERS = samplers_of(CONFIG)


def scheduler_of(name: str, config: dict[str, Any], num_steps: int, **options: Any) -> Any:
    class_name, own = SCHEDULERS[name]
    scheduler = getattr(diffusers, class_name).from_config(config, **own, **options)
    scheduler.set_timesteps(num_steps)
    return scheduler


def flow_scheduler_of(name: str, shift: float, num_steps: int) -> Any:
    class_name, own, shift_name = FLOW_SCHEDULERS[name]
    scheduler = getattr(diffusers, class_name)(**own, **{shift_name: shift})
    scheduler.set_timesteps(num_steps)
    return scheduler


def flow_samplers_of(shift: float) -> Samplers:
    return Samplers.from_config(
        {"prediction_type": "flow_prediction", "shift": shift, "num_train_timesteps": 1000}, {}
    )


def strength_for(num_steps: int, begin: int) -> float | None:
    """A strength with which a run begins at that step, however it is rounded."""
    return None if begin == 0 else (num_steps - begin + 0.5) / num_steps


class Oracle:
    """A run of a diffusers scheduler, from noise at its first step, from a picture at a later."""

    def __init__(self, scheduler: Any, begin: int = 0, end: int | None = None) -> None:
        self.scheduler = scheduler
        self.begin = begin
        self.timesteps = scheduler.timesteps[begin:end]
        if hasattr(scheduler, "set_begin_index"):
            # Karras levels can round to equal timesteps, which diffusers looks up by value else.
            scheduler.set_begin_index(begin)
        self.is_exploding = type(scheduler).__name__ in VARIANCE_EXPLODING
        generator = torch.Generator("cpu").manual_seed(SEED)
        self.draws = {"generator": generator}
        if "generator" not in inspect.signature(scheduler.step).parameters:
            self.draws = {}
        self.noise = torch.randn(SHAPE, generator=generator)[None]
        self.picture = torch.from_numpy(np.random.default_rng(SEED).normal(size=SHAPE))[
            None
        ].float()
        if begin == 0:
            self.sample = self.noise * getattr(scheduler, "init_noise_sigma", 1.0)
        else:
            self.sample = self.noisy_picture(0)

    def given(self, step: int) -> np.ndarray:
        """What the UNet is given, which is in the scale of our samples."""
        if not hasattr(self.scheduler, "scale_model_input"):
            return self.sample[0].numpy()
        return self.scheduler.scale_model_input(self.sample, self.timesteps[step])[0].numpy()

    def step(self, output: np.ndarray, step: int, **options: Any) -> np.ndarray | None:
        """Make a step; returns the x_0 it predicted, or None where diffusers does not tell."""
        stepped = self.scheduler.step(
            torch.from_numpy(output)[None],
            self.timesteps[step],
            self.sample,
            **self.draws,
            **options,
        )
        self.sample = stepped.prev_sample
        if hasattr(self.scheduler, "model_outputs"):
            return self.scheduler.model_outputs[-1][0].numpy()
        x0 = getattr(stepped, "pred_original_sample", None)
        return None if x0 is None else x0[0].numpy()

    def noisy_picture(self, step: int) -> Any:
        """A picture with the noise of that step, the next to be made, in diffusers' scale."""
        add_noise = getattr(self.scheduler, "add_noise", None)
        timestep = self.timesteps[step : step + 1]
        if add_noise is None:
            return self.scheduler.scale_noise(self.picture, timestep, self.noise)
        return add_noise(self.picture, self.noise, timestep)

    def preserved(self, sample: Any, step: int) -> np.ndarray:
        """A sample at the start of that step in the scale of ours."""
        scale = 1.0
        if self.is_exploding:
            scale = float(1 + self.scheduler.sigmas[self.begin + step] ** 2) ** -0.5
        return sample[0].numpy() * scale


def assert_follows(
    oracle: Oracle,
    table: SolverTable,
    unet: ToyUNet,
    tolerance: float = 5e-5,
    **options: Any,
) -> None:
    """Fed the same UNet outputs and drawing from equal streams, both go the same way.

    The tolerance is for the rounding of whole runs in float32, on both sides.
    """
    timesteps = oracle.timesteps.numpy()
    np.testing.assert_allclose(table.timesteps, timesteps, atol=1e-4)
    stream = GaussianNoise(SEED)
    states = initial_state(stream.draw(SHAPE), table)[None]
    noise, picture = oracle.noise[0].numpy(), oracle.picture[0].numpy()
    if oracle.begin > 0:
        states[:, SAMPLE] = table.levels[0, 0] * picture + table.levels[0, 1] * noise

    def assert_near(expected: np.ndarray, actual: np.ndarray, what: str) -> None:
        worst = np.abs(expected - actual).max()
        allowed = tolerance * max(1.0, np.abs(expected).max())
        where = f"{what} at step {step} of {len(timesteps)} from {oracle.begin}"
        assert worst <= allowed, f"{where}: {worst:.2e} > {allowed:.2e}"

    for step, timestep in enumerate(timesteps):
        noisy = table.levels[step, 0] * picture + table.levels[step, 1] * noise
        assert_near(oracle.preserved(oracle.noisy_picture(step), step), noisy, "noise on a picture")
        given = oracle.given(step)
        output = unet(given, float(timestep))
        x0 = oracle.step(output, step, **options)
        if table.is_stochastic:
            # Where diffusers draws nothing at the last step, this is noise of weight zero.
            states[:, NOISE] = stream.draw(SHAPE)
        states = advance(states, output[None], [table], [step])

        assert_near(oracle.preserved(oracle.sample, step + 1), states[0, SAMPLE], "sample")
        their_x0 = unet.x0(given, float(timestep)) if x0 is None else x0
        assert_near(their_x0, predicted_x0(states[0], table, step), "x_0")


def assert_sampler_follows(
    name: str,
    config: dict[str, Any],
    num_steps: int,
    *,
    begin: int = 0,
    eta: float | None = None,
    spacing: str | None = None,
    tolerance: float = 5e-5,
) -> None:
    chosen = {} if spacing is None else {"timestep_spacing": spacing}
    scheduler = scheduler_of(name, config, num_steps, **chosen)
    samplers = SAMPLERS if config is CONFIG else samplers_of(config)
    table = samplers.table(name, num_steps, eta, spacing, strength=strength_for(num_steps, begin))
    unet = ToyUNet(num_steps, config, scheduler.alphas_cumprod.numpy())
    options = {} if eta is None else {"eta": eta}
    assert_follows(Oracle(scheduler, begin), table, unet, tolerance, **options)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", SPACED)
def test_every_spacing_follows_diffusers(name: str, spacing: str) -> None:
    """What a request chooses does what `from_config(config, timestep_spacing=...)` does."""
    for num_steps in STEP_COUNTS:
        assert_sampler_follows(name, CONFIG, num_steps, spacing=spacing)


@pytest.mark.parametrize("name", sorted(SCHEDULERS.keys() - SPACED))
def test_samplers_with_timesteps_of_their_own_follow_diffusers(name: str) -> None:
    """Whatever the checkpoint's spacing, which diffusers ignores, too."""
    for spacing in SPACINGS:
        for num_steps in STEP_COUNTS:
            assert_sampler_follows(name, CONFIG | {"timestep_spacing": spacing}, num_steps)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_ddim_adds_as_much_noise_as_diffusers(eta: float, spacing: str) -> None:
    for num_steps in STEP_COUNTS:
        assert_sampler_follows("ddim", CONFIG, num_steps, eta=eta, spacing=spacing)


# With 9 / 11 the timestep that a step denoises to is nearly a whole number, and rounding decides.
@pytest.mark.parametrize("eta", [0.0, 0.1, 0.5, 9 / 11, 1.0])
def test_tcd_adds_as_much_noise_as_diffusers(eta: float) -> None:
    for num_steps in STEP_COUNTS:
        assert_sampler_follows("tcd", CONFIG, num_steps, eta=eta)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_sampler_follows_diffusers_with_v_prediction(name: str) -> None:
    for num_steps in FEW_STEP_COUNTS:
        assert_sampler_follows(name, CONFIG | {"prediction_type": "v_prediction"}, num_steps)


# diffusers' EulerAncestralDiscreteScheduler has no such prediction type.
@pytest.mark.parametrize("name", sorted(SCHEDULERS.keys() - {"euler_ancestral"}))
def test_every_sampler_follows_diffusers_with_x0_prediction(name: str) -> None:
    for num_steps in FEW_STEP_COUNTS:
        assert_sampler_follows(name, CONFIG | {"prediction_type": "sample"}, num_steps)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", SPACED)
def test_the_checkpoints_own_spacing_follows_diffusers(name: str, spacing: str) -> None:
    for num_steps in FEW_STEP_COUNTS:
        assert_sampler_follows(name, CONFIG | {"timestep_spacing": spacing}, num_steps)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_ends_where_the_checkpoint_says(eta: float) -> None:
    for num_steps in FEW_STEP_COUNTS:
        config = CONFIG | {"set_alpha_to_one": False, "timestep_spacing": "leading"}
        assert_sampler_follows("ddim", config, num_steps, eta=eta)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_run_that_begins_late_follows_diffusers(name: str) -> None:
    """From a picture with noise, and with no history: at every step of some runs."""
    for num_steps in (2, 3, 4, 7, 10):
        for begin in range(1, num_steps):
            assert_sampler_follows(name, CONFIG, num_steps, begin=begin)
    for num_steps, begin in ((20, 13), (20, 14), (50, 40), (50, 41)):
        assert_sampler_follows(name, CONFIG, num_steps, begin=begin)


@pytest.mark.parametrize("eta", [0.4, 1.0])
@pytest.mark.parametrize("name", ["ddim", "tcd"])
def test_a_run_that_begins_late_adds_as_much_noise_as_diffusers(name: str, eta: float) -> None:
    for num_steps, begin in ((4, 1), (7, 2), (20, 13)):
        assert_sampler_follows(name, CONFIG, num_steps, begin=begin, eta=eta)


# The first sample is unit noise, at most 4 of it. Its alpha is 2**-12 for all our samplers, as for
# diffusers' but DDIM, where it is 0: an x_0 differs by 4 * 2**-12. diffusers' Euler has x / alpha
# there, 4 * 2**12, of which float32 has lost 2**-24.
@pytest.mark.parametrize(
    ("name", "tolerance"), [("unipc", 5e-5), ("euler", 2**-10), ("ddim", 2**-10)]
)
def test_zero_terminal_snr_follows_diffusers(name: str, tolerance: float) -> None:
    config = CONFIG | {
        "rescale_betas_zero_snr": True,
        "prediction_type": "v_prediction",
        "timestep_spacing": "trailing",
    }
    for num_steps in STEP_COUNTS:
        assert_sampler_follows(name, config, num_steps, tolerance=tolerance)
    for num_steps, begin in ((4, 1), (20, 13)):
        assert_sampler_follows(name, config, num_steps, begin=begin)


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("name", FLOW_SCHEDULERS)
def test_flow_matching_follows_diffusers(name: str, shift: float) -> None:
    samplers = flow_samplers_of(shift)
    for num_steps in STEP_COUNTS:
        oracle = Oracle(flow_scheduler_of(name, shift, num_steps))
        assert_follows(oracle, samplers.table(name, num_steps), ToyTransformer(num_steps))


@pytest.mark.parametrize("name", FLOW_SCHEDULERS)
def test_flow_matching_that_begins_late_follows_diffusers(name: str) -> None:
    samplers = flow_samplers_of(3.0)
    for num_steps in (2, 3, 7, 28):
        for begin in range(1, num_steps, 1 + num_steps // 10):
            # Rounded up: half a step more than is left would be one too many.
            strength = (num_steps - begin) / num_steps - 1e-3
            oracle = Oracle(flow_scheduler_of(name, 3.0, num_steps), begin)
            table = samplers.table(name, num_steps, strength=strength)
            assert_follows(oracle, table, ToyTransformer(num_steps))


def pipelines_timesteps(
    pipeline: str, scheduler: Any, num_steps: int, strength: float | None, **options: Any
) -> np.ndarray:
    """The timesteps that a pipeline of diffusers makes, being nothing but its scheduler here."""
    get_timesteps = getattr(diffusers, pipeline).get_timesteps
    itself = SimpleNamespace(scheduler=scheduler)
    timesteps, count = get_timesteps(itself, num_steps, strength, "cpu", **options)
    assert len(timesteps) == count
    return timesteps.numpy()


def assert_timesteps(expected: np.ndarray, samplers: Samplers, name: str, **choice: Any) -> None:
    """The table of a choice has these timesteps; if they are none, the choice is bad."""
    if len(expected) == 0:
        with pytest.raises(BadChoice, match="leaves no"):
            samplers.table(name, **choice)
    else:
        table = samplers.table(name, **choice)
        np.testing.assert_allclose(table.timesteps, expected, atol=1e-4, err_msg=str(choice))


SHARES = [percent / 100 for percent in range(1, 100)]
PIPELINES = (
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionXLImg2ImgPipeline",
    "StableDiffusionXLInpaintPipeline",
)
FLOW_PIPELINES = ("StableDiffusion3Img2ImgPipeline", "StableDiffusion3InpaintPipeline")


@pytest.mark.parametrize("num_steps", [1, 3, 10, 30, 50])
def test_strength_leaves_the_steps_that_diffusers_pipelines_leave(num_steps: int) -> None:
    """Also if it arrives as float32."""
    scheduler = scheduler_of("ddim", CONFIG, num_steps)
    for strength in (*SHARES, 1 / 3, 2 / 3, 1.0):
        for pipeline in PIPELINES:
            expected = pipelines_timesteps(pipeline, scheduler, num_steps, strength)
            for given in (strength, float(np.float32(strength))):
                choice = {"num_inference_steps": num_steps, "strength": given}
                assert_timesteps(expected, SAMPLERS, "ddim", **choice)


@pytest.mark.parametrize("num_steps", [1, 3, 10, 28, 50])
def test_strength_leaves_the_steps_of_a_flow_that_diffusers_pipeline_leaves(num_steps: int) -> None:
    scheduler = flow_scheduler_of("euler", 3.0, num_steps)
    samplers = flow_samplers_of(3.0)
    for strength in (*SHARES, 1 / 3, 2 / 3, 1.0):
        for pipeline in FLOW_PIPELINES:
            expected = pipelines_timesteps(pipeline, scheduler, num_steps, strength)
            for given in (strength, float(np.float32(strength))):
                choice = {"num_inference_steps": num_steps, "strength": given}
                assert_timesteps(expected, samplers, "euler", **choice)


def kept_before(timesteps: np.ndarray, denoising_end: float) -> np.ndarray:
    """What diffusers' SDXL pipelines keep, in a line of their loops: no function does it alone."""
    cutoff = int(round(1000 - (denoising_end * 1000)))  # noqa: RUF046  as it is written there
    return timesteps[timesteps >= cutoff]


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", ["euler", "unipc", "ddim"])
def test_experts_share_the_steps_as_diffusers_pipelines_do(name: str, spacing: str) -> None:
    """Between them the steps are made once each, whatever the share of the first."""
    for num_steps in (1, 7, 30):
        scheduler = scheduler_of(name, CONFIG, num_steps, timestep_spacing=spacing)
        choice = {"num_inference_steps": num_steps, "timestep_spacing": spacing}
        everything = scheduler.timesteps.numpy()
        for share in SHARES[::4]:
            pipeline = PIPELINES[-1]
            last = pipelines_timesteps(pipeline, scheduler, num_steps, 0.3, denoising_start=share)
            first = kept_before(everything, share)
            np.testing.assert_array_equal(np.append(first, last), everything)
            for given in (share, float(np.float32(share))):
                # The strength is of no account.
                started = {"denoising_start": given, "strength": 0.3}
                assert_timesteps(last, SAMPLERS, name, **choice, **started)
                assert_timesteps(first, SAMPLERS, name, **choice, denoising_end=given)
            if len(last) > 0 and share < 0.9:
                both = {"denoising_start": share, "denoising_end": 0.9}
                assert_timesteps(kept_before(last, 0.9), SAMPLERS, name, **choice, **both)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_run_that_ends_early_follows_diffusers(name: str) -> None:
    """It makes the steps of a whole run, which does not know that it will be cut."""
    for num_steps, begin, share in ((5, 0, 0.7), (20, 0, 0.8), (20, 3, 0.55), (21, 10, 0.8)):
        scheduler = scheduler_of(name, CONFIG, num_steps)
        end = len(kept_before(scheduler.timesteps.numpy(), share))
        assert begin < end
        strength = strength_for(num_steps, begin)
        table = SAMPLERS.table(name, num_steps, strength=strength, denoising_end=share)
        unet = ToyUNet(num_steps, CONFIG, scheduler.alphas_cumprod.numpy())
        assert_follows(Oracle(scheduler, begin, end), table, unet)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_refiner_follows_diffusers(name: str) -> None:
    """It begins with what the base left, whose noise is that of its first step."""
    for num_steps, share in ((10, 0.5), (25, 0.8), (30, 0.6)):
        scheduler = scheduler_of(name, CONFIG, num_steps)
        timesteps = scheduler.timesteps.numpy()
        begin = len(timesteps) - len(timesteps[timesteps < round(1000 - share * 1000)])
        assert begin > 0
        table = SAMPLERS.table(name, num_steps, denoising_start=share)
        unet = ToyUNet(num_steps, CONFIG, scheduler.alphas_cumprod.numpy())
        assert_follows(Oracle(scheduler, begin), table, unet)


@pytest.mark.parametrize("strength", [0.1, 0.33, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("num_steps", [1, 2, 4, 5])
def test_a_consistency_model_makes_all_steps_whatever_the_strength(
    num_steps: int, strength: float
) -> None:
    """As diffusers' LatentConsistencyModelImg2ImgPipeline, which hands the strength on."""
    scheduler = diffusers.LCMScheduler.from_config(CONFIG, clip_sample=False)
    scheduler.set_timesteps(num_steps, strength=strength)
    samplers = samplers_of(CONFIG, is_consistency_model=True)
    table = samplers.table("lcm", num_steps, strength=strength)

    np.testing.assert_array_equal(table.timesteps, scheduler.timesteps.numpy())


@pytest.mark.parametrize("strength", [0.0, 0.07, 1.5])
def test_a_strength_that_a_consistency_model_cannot_have_is_refused(strength: float) -> None:
    samplers = samplers_of(CONFIG, is_consistency_model=True)

    with pytest.raises(BadChoice, match=r"^strength: .* for 4 steps, allowed are 0\.08 to 1"):
        samplers.table("lcm", 4, strength=strength)
