"""Guidance, row by row."""

from typing import Any

import numpy as np
import pytest
from engine_harness import LIMITS, WAIT_S, Harness

from darkroom_engine import ImageRequest, Job
from darkroom_engine.arrays import HOST
from darkroom_engine.batch import StepBatch, stack_conditioning
from darkroom_engine.sample import Group, Sample
from darkroom_engine.schedule import NoiseSchedule
from darkroom_engine.solver import PREDICTION, initial_state
from darkroom_engine.unipc import UniPC

SHAPE = (4, 6, 5)
SCHEDULE = NoiseSchedule(tuple(0.01 + n / 50 for n in range(1000)), "sample", "linspace")


def make_sample(seed: int, num_tokens: int = 77, **fields: Any) -> Sample:
    values = {"num_inference_steps": 10, "guidance_scale": 4.0} | fields
    job = Job(ImageRequest.parse({"prompt": b"", **values}, LIMITS), lambda _: None)
    table = UniPC().table(SCHEDULE, 10)
    sample = Sample(job, 0, table, Group("unet", SHAPE), job.request.guided_steps(10))
    rng = np.random.default_rng(seed)
    sample.state = initial_state(rng.normal(size=SHAPE).astype(np.float32), sample.table)
    sample.conditional = {"hidden": rng.normal(size=(num_tokens, 3)).astype(np.float32)}
    sample.unconditional = {"hidden": rng.normal(size=(77, 3)).astype(np.float32)}
    return sample


def outputs_for(batch: StepBatch) -> np.ndarray:
    return np.random.default_rng(9).normal(size=(batch.num_rows, *SHAPE)).astype(np.float32)


def stacked(batch: StepBatch) -> dict[str, np.ndarray]:
    return stack_conditioning([row.conditioning for row in batch.rows], HOST)


def guided(sample: Sample) -> np.ndarray:
    """What the solver was given: the schedule takes the UNet's output for x_0 as it is."""
    return sample.state[PREDICTION]


def test_each_row_has_its_own_guidance() -> None:
    samples = [make_sample(0), make_sample(1, guidance_scale=1.0), make_sample(2)]
    batch = StepBatch(samples, HOST)
    outputs = outputs_for(batch)
    assert batch.num_rows == 5
    # Those with guidance come first.
    assert batch.samples == [samples[0], samples[2], samples[1]]
    batch.apply(outputs)
    assert batch.failures() == []

    for n, sample in enumerate((samples[0], samples[2])):
        expected = outputs[3 + n] + 4 * (outputs[n] - outputs[3 + n])
        np.testing.assert_allclose(guided(sample), expected, rtol=1e-6)
    np.testing.assert_array_equal(guided(samples[1]), outputs[2])


@pytest.mark.parametrize("phi", [0.0, 0.3, 1.0])
def test_rescaled_guidance_has_the_contrast_of_the_conditional(phi: float) -> None:
    sample = make_sample(0, guidance_rescale=phi)
    batch = StepBatch([sample], HOST)
    outputs = outputs_for(batch)
    batch.apply(outputs)

    plain = outputs[1] + 4 * (outputs[0] - outputs[1])
    target = phi * outputs[0].std(ddof=1) + (1 - phi) * plain.std(ddof=1)
    assert guided(sample).std(ddof=1) == pytest.approx(target, rel=1e-5)


@pytest.mark.torch
def test_rescaled_guidance_is_that_of_diffusers() -> None:
    torch = pytest.importorskip("torch")
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

    sample = make_sample(0, guidance_rescale=0.7)
    batch = StepBatch([sample], HOST)
    outputs = outputs_for(batch)
    batch.apply(outputs)

    conditional, plain = (
        torch.from_numpy(array[None])
        for array in (outputs[0], outputs[1] + 4 * (outputs[0] - outputs[1]))
    )
    expected = rescale_noise_cfg(plain, conditional, guidance_rescale=0.7)[0].numpy()
    np.testing.assert_allclose(guided(sample), expected, rtol=1e-5, atol=1e-6)


def test_guidance_is_on_within_its_interval_alone() -> None:
    sample = make_sample(0, guidance_start=0.2, guidance_stop=0.7)
    rows = []
    for _ in range(10):
        batch = StepBatch([sample], HOST)
        rows.append(batch.num_rows)
        batch.apply(outputs_for(batch))

    assert rows == [1, 1, 2, 2, 2, 2, 2, 1, 1, 1]


def test_shorter_prompts_are_repeated_beside_longer_ones() -> None:
    long, short = make_sample(0, num_tokens=154), make_sample(1)
    hidden = stacked(StepBatch([long, short], HOST))["hidden"]

    assert hidden.shape == (4, 154, 3)
    np.testing.assert_array_equal(hidden[0], long.conditional["hidden"])
    for row, once in ((1, short.conditional), (3, short.unconditional)):
        np.testing.assert_array_equal(hidden[row], np.concatenate([once["hidden"]] * 2))


def test_two_and_three_chunks_meet_at_six() -> None:
    samples = [make_sample(n, num_tokens=77 * n, guidance_scale=1.0) for n in (2, 3)]

    assert stacked(StepBatch(samples, HOST))["hidden"].shape == (2, 462, 3)


def test_a_long_prompt_leaves_its_neighbours_pictures_alone(harness: Harness) -> None:
    request = {"num_inference_steps": 9, "seed": 3}
    long = {"prompt": "x" * 200, "max_embeddings_multiples": 3} | request
    alone = [harness.picture(**long), harness.picture("a cat", **request)]

    harness.networks.gate.clear()
    futures = [harness.ask(**long), harness.ask("a cat", **request)]
    harness.networks.gate.set()

    pictures = [future.result(WAIT_S).pictures[0] for future in futures]
    assert max(harness.networks.step_rows) == 4
    for one, other in zip(alone, pictures, strict=True):
        assert np.abs(levels(one) - levels(other)).max() <= 1


def levels(encoded: bytes) -> np.ndarray:
    from io import BytesIO

    from PIL import Image

    return np.asarray(Image.open(BytesIO(encoded))).astype(int)
