"""Coefficient tables as data: what must hold of them whatever the schedule."""

import numpy as np
import pytest

from darkroom_engine.samplers import BadChoice, Samplers
from darkroom_engine.schedule import TIMESTEP_SPACINGS, NoiseSchedule, TooManySteps
from darkroom_engine.solver import (
    LAST,
    NOISE,
    NUM_TERMS,
    PREDICTION,
    SolverTable,
    advance,
    predicted_x0,
    uncorrected,
)
from darkroom_engine.tcd import TCD
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


@pytest.fixture
def samplers(manifest_document: dict) -> Samplers:
    return Samplers.from_config(manifest_document["noise_schedule"], manifest_document["solver"])


def assert_equal(expected: SolverTable, actual: SolverTable) -> None:
    for key in ("timesteps", "convert", "correct", "advance", "preview", "initial_scale"):
        np.testing.assert_array_equal(getattr(expected, key), getattr(actual, key), key)
    assert expected.is_stochastic == actual.is_stochastic


def test_a_table_is_computed_once(samplers: Samplers) -> None:
    assert samplers.table("unipc", 20) is samplers.table("unipc", 20)
    assert samplers.table("unipc", 20) is not samplers.table("unipc", 21)
    assert samplers.table("ddim", 20, eta=0.5) is samplers.table("ddim", 20, 0.5, None)
    assert samplers.table("ddim", 20, eta=0.5) is not samplers.table("ddim", 20, eta=0.6)
    trailing = samplers.table("ddim", 20, timestep_spacing="trailing")
    assert trailing is samplers.table("ddim", 20, None, "trailing")
    assert trailing is not samplers.table("ddim", 20, timestep_spacing="leading")


@pytest.mark.parametrize(
    "name", ["unipc", "dpmpp_2m", "dpmpp_2m_sde", "euler", "euler_ancestral", "ddim"]
)
def test_a_chosen_spacing_stands_in_for_the_checkpoints_own(
    manifest_document: dict, samplers: Samplers, name: str
) -> None:
    for spacing in TIMESTEP_SPACINGS:
        schedule = manifest_document["noise_schedule"] | {"timestep_spacing": spacing}
        own = Samplers.from_config(schedule, manifest_document["solver"])

        assert_equal(own.table(name, 7), samplers.table(name, 7, timestep_spacing=spacing))


@pytest.mark.parametrize(("name", "default"), [("ddim", 0.0), ("tcd", 0.3)])
def test_eta_has_the_default_of_diffusers(samplers: Samplers, name: str, default: float) -> None:
    assert_equal(samplers.table(name, 7, eta=default), samplers.table(name, 7))


@pytest.mark.parametrize("name", ["ddim", "tcd"])
def test_only_an_eta_above_zero_takes_noise(samplers: Samplers, name: str) -> None:
    without = samplers.table(name, 7, eta=0.0)
    fresh = samplers.table(name, 7, eta=0.2)

    assert not without.is_stochastic
    assert not without.advance[:, NOISE].any()
    assert fresh.is_stochastic
    assert (fresh.advance[:-1, NOISE] > 0).all()


def test_an_eta_in_float32_is_the_same_eta(samplers: Samplers) -> None:
    """A request's number arrives as float32."""
    assert_equal(samplers.table("tcd", 8), samplers.table("tcd", 8, eta=float(np.float32(0.3))))


def test_a_pair_of_singlestep_steps_starts_from_one_sample(samplers: Samplers) -> None:
    """Every second step goes from the sample before the last, except the last step of all."""
    for num_steps, of_order_2 in ((1, []), (2, []), (3, [1]), (6, [1, 3]), (7, [1, 3, 5])):
        table = samplers.table("dpmpp_sde", num_steps)

        assert np.flatnonzero(table.advance[:, LAST]).tolist() == of_order_2


WITH_OWN_TIMESTEPS = (
    *("unipc_karras", "dpmpp_2m_karras", "dpmpp_2m_sde_karras"),
    *("dpmpp_sde", "dpmpp_sde_karras", "lcm", "tcd"),
)
WITHOUT_ETA = (
    *("unipc", "unipc_karras", "dpmpp_2m", "dpmpp_2m_karras", "dpmpp_2m_sde"),
    *("dpmpp_2m_sde_karras", "dpmpp_sde", "dpmpp_sde_karras", "euler", "euler_ancestral", "lcm"),
)


@pytest.mark.parametrize(
    ("field", "message", "choice"),
    [
        ("sampler", "'heun' does not exist, there are unipc, ", {"name": "heun"}),
        *(
            ("eta", f"only ddim and tcd take it, not {name}$", {"name": name, "eta": 0.5})
            for name in WITHOUT_ETA
        ),
        ("eta", "-0.1 is out of range, allowed are 0 to 1", {"name": "ddim", "eta": -0.1}),
        ("eta", "1.5 is out of range, allowed are 0 to 1", {"name": "tcd", "eta": 1.5}),
        ("eta", "nan is out of range, allowed are 0 to 1", {"name": "ddim", "eta": float("nan")}),
        (
            "timestep_spacing",
            "'karras' does not exist, there are linspace, leading, trailing",
            {"name": "ddim", "timestep_spacing": "karras"},
        ),
        *(
            (
                "timestep_spacing",
                f"{name} has timesteps of its own",
                {"name": name, "timestep_spacing": "trailing"},
            )
            for name in WITH_OWN_TIMESTEPS
        ),
        *(
            (
                "num_inference_steps",
                f"51 is out of range, allowed are 1 to 50 for {name}",
                {"name": name, "num_inference_steps": 51},
            )
            for name in ("lcm", "tcd")
        ),
    ],
)
def test_a_bad_choice_names_its_field(
    samplers: Samplers, field: str, message: str, choice: dict
) -> None:
    with pytest.raises(BadChoice, match=f"^{field}: {message}") as caught:
        samplers.table(**{"num_inference_steps": 10, **choice})

    assert caught.value.field == field
    assert str(caught.value) == f"{field}: {caught.value.problem}"


def test_a_solver_that_the_checkpoint_made_impossible_is_a_bad_choice(
    manifest_document: dict,
) -> None:
    options = {"solver_order": 3, "lower_order_final": False}
    samplers = Samplers.from_config(manifest_document["noise_schedule"], options)

    with pytest.raises(BadChoice, match="sampler: unipc: the solver has no finite coefficients"):
        samplers.table("unipc", 10)


def test_a_rule_says_itself_how_many_steps_it_can_do(schedule: NoiseSchedule) -> None:
    assert TCD(original_inference_steps=8).table(schedule, 8).num_steps == 8

    with pytest.raises(TooManySteps, match="9 is out of range, allowed are 1 to 8"):
        TCD(original_inference_steps=8).table(schedule, 9)


def test_the_preview_is_the_newest_prediction_unless_a_table_says_otherwise() -> None:
    weights = np.zeros((3, NUM_TERMS))
    parts = {
        "timesteps": np.arange(3.0),
        "convert": np.ones((3, 2)),
        "correct": uncorrected(3),
        "advance": weights,
    }
    state = np.random.default_rng(0).normal(size=(NUM_TERMS, 4, 2, 2)).astype(np.float32)
    other = np.array([[1.0, 0.0], [0.5, 0.25], [0.0, 2.0]])

    default = SolverTable(**parts)
    x0 = predicted_x0(state, default, 1)
    mixed = predicted_x0(state, SolverTable(**parts, preview=other), 1)

    assert default.preview.shape == (3, 2)
    np.testing.assert_array_equal(x0, state[PREDICTION + 1])
    np.testing.assert_allclose(mixed, 0.5 * state[LAST] + 0.25 * state[PREDICTION + 1], rtol=1e-6)
    assert x0.dtype == mixed.dtype == np.float32
    assert not np.shares_memory(x0, state)


def test_a_preview_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match="no finite coefficients"):
        SolverTable(
            timesteps=np.arange(1.0),
            convert=np.ones((1, 2)),
            correct=uncorrected(1),
            advance=np.zeros((1, NUM_TERMS)),
            preview=np.array([[np.inf, 0.0]]),
        )
