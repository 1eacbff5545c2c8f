"""Coefficient tables as data: what must hold of them whatever the schedule."""

import numpy as np
import pytest

from darkroom_engine.samplers import Samplers
from darkroom_engine.schedule import NoiseSchedule
from darkroom_engine.solver import NUM_TERMS, advance
from darkroom_engine.unipc import UniPC


@pytest.fixture
def schedule(manifest_document: dict) -> NoiseSchedule:
    return NoiseSchedule.from_config(manifest_document["noise_schedule"])


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("num_steps", [1, 2, 5, 50])
def test_a_perfect_prediction_ends_in_exactly_it(
    schedule: NoiseSchedule, order: int, num_steps: int
) -> None:
    """If the network always says the same x_0, every update is exact, and x_0 is the end."""
    table = UniPC(solver_order=order).table(schedule, num_steps)
    rng = np.random.default_rng(0)
    x0 = rng.normal(size=(1, 4, 4, 4))
    levels = schedule.levels(num_steps, use_karras_sigmas=False, final_sigmas_type="zero")
    states = np.zeros((1, NUM_TERMS, 4, 4, 4))
    states[:, 0] = rng.normal(size=x0.shape)
    for step in range(num_steps):
        epsilon = (states[:, 0] - levels.alpha[step] * x0) / levels.sigma[step]
        states = advance(states, epsilon, [table], [step])

    np.testing.assert_allclose(states[:, 0], x0, atol=1e-9)


def test_an_order_that_cannot_end_at_zero_noise_is_refused(schedule: NoiseSchedule) -> None:
    with pytest.raises(ValueError, match=r"no finite coefficients .* use lower_order_final"):
        UniPC(solver_order=3, lower_order_final=False).table(schedule, 10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver_order": 4}, "solver_order: 4 is outside 1 to 3"),
        ({"solver_type": "bh3"}, "solver_type: 'bh3' is not bh1 or bh2"),
    ],
)
def test_unknown_variants_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UniPC(**options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prediction_type": "flow"}, "prediction_type: 'flow' is not one of epsilon, v_pred"),
        ({"timestep_spacing": "random"}, "timestep_spacing: 'random' is not one of linspace"),
    ],
)
def test_unknown_schedules_are_refused(manifest_document: dict, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NoiseSchedule.from_config(manifest_document["noise_schedule"] | change)


def test_an_unknown_end_is_refused(schedule: NoiseSchedule) -> None:
    with pytest.raises(ValueError, match="final_sigmas_type: 'one' is not zero or sigma_min"):
        schedule.levels(3, use_karras_sigmas=False, final_sigmas_type="one")


def test_a_table_is_computed_once(manifest_document: dict) -> None:
    samplers = Samplers.from_config(
        manifest_document["noise_schedule"], manifest_document["solver"]
    )

    assert samplers.table("unipc", 20) is samplers.table("unipc", 20)
