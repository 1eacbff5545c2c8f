"""Coefficient tables as data: what must hold of them whatever the schedule."""

import numpy as np
import pytest

from darkroom_engine.samplers import BadChoice, Samplers
from darkroom_engine.schedule import (
    TIMESTEP_SPACINGS,
    FlowSchedule,
    NoiseSchedule,
    Schedule,
    TooManySteps,
    schedule_from_config,
)
from darkroom_engine.solver import (
    LAST,
    NOISE,
    NUM_TERMS,
    PREDICTION,
    SAMPLE,
    SolverTable,
    advance,
    predicted_x0,
    uncorrected,
)
from darkroom_engine.tcd import TCD
from darkroom_engine.unipc import UniPC

FLOW = {"prediction_type": "flow_prediction", "shift": 3.0, "num_train_timesteps": 1000}


@pytest.fixture
def schedule(manifest_document: dict) -> NoiseSchedule:
    return NoiseSchedule.from_config(manifest_document["noise_schedule"])


def assert_a_perfect_prediction_is_kept(
    table: SolverTable, prediction_type: str, x0: np.ndarray
) -> None:
    """If the network always says the same x_0, every update is exact, and x_0 is the end.

    Until then a step starts from x_0 with the same noise, as much as the table says.
    """
    noise = np.random.default_rng(0).normal(size=x0.shape)
    states = np.zeros((1, NUM_TERMS, *x0.shape))
    states[:, SAMPLE] = table.levels[0, 0] * x0 + table.levels[0, 1] * noise
    for step in range(table.num_steps):
        alpha, sigma = table.levels[step]
        np.testing.assert_allclose(states[0, SAMPLE], alpha * x0 + sigma * noise, atol=1e-9)
        outputs = {"epsilon": noise, "flow_prediction": noise - x0}
        states = advance(states, outputs[prediction_type][None], [table], [step])

    np.testing.assert_allclose(states[0, SAMPLE], x0, atol=1e-9)


SCHEDULES = ("discrete", "flow")


@pytest.fixture(params=SCHEDULES)
def any_schedule(request: pytest.FixtureRequest, manifest_document: dict) -> Schedule:
    discrete = manifest_document["noise_schedule"]
    return schedule_from_config({"discrete": discrete, "flow": FLOW}[request.param])


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("num_steps", [1, 2, 5, 50])
def test_a_perfect_prediction_ends_in_exactly_it(
    any_schedule: Schedule, order: int, num_steps: int
) -> None:
    table = UniPC(solver_order=order).table(any_schedule, num_steps)
    x0 = np.random.default_rng(1).normal(size=(4, 4, 4))

    assert_a_perfect_prediction_is_kept(table, any_schedule.prediction_type, x0)


@pytest.mark.parametrize("name", ["unipc", "unipc_karras", "dpmpp_2m", "euler"])
@pytest.mark.parametrize("begin", [1, 2, 9])
def test_a_perfect_prediction_ends_in_it_from_wherever_a_run_begins(
    samplers: Samplers, name: str, begin: int
) -> None:
    table = samplers.table(name, 10, strength=1 - begin / 10)
    x0 = np.random.default_rng(1).normal(size=(4, 4, 4))

    assert table.num_steps == 10 - begin
    assert_a_perfect_prediction_is_kept(table, "epsilon", x0)


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


@pytest.fixture
def flow_samplers() -> Samplers:
    return Samplers.from_config(FLOW, {})


TABLES = ("timesteps", "levels", "convert", "correct", "advance", "preview")


def assert_equal(expected: SolverTable, actual: SolverTable) -> None:
    for key in (*TABLES, "initial_scale"):
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
    late = samplers.table("ddim", 20, strength=0.5)
    assert late is samplers.table("ddim", 20, strength=0.5, denoising_end=None)
    assert late is not samplers.table("ddim", 20, denoising_start=0.5)


def test_the_levels_are_of_the_kind_of_the_schedule(
    samplers: Samplers, flow_samplers: Samplers
) -> None:
    for name in samplers.names:
        table = samplers.table(name, 9)
        np.testing.assert_allclose((table.levels**2).sum(axis=1), 1, err_msg=name)
        assert (np.diff(table.levels[:, 1]) < 0).all(), name
    for name in flow_samplers.names:
        table = flow_samplers.table(name, 9)
        np.testing.assert_allclose(table.levels.sum(axis=1), 1, err_msg=name)
        assert (np.diff(table.levels[:, 1]) < 0).all(), name
        assert table.initial_scale == 1.0


def test_a_part_without_history_is_cut_out_of_the_whole(samplers: Samplers) -> None:
    for name in ("euler", "euler_ancestral", "ddim", "lcm", "tcd"):
        whole = samplers.table(name, 20)
        part = samplers.table(name, 20, strength=0.75, denoising_end=0.8)

        assert 0 < part.num_steps < 15
        for key in TABLES:
            rows = slice(5, 5 + part.num_steps)
            np.testing.assert_array_equal(getattr(whole, key)[rows], getattr(part, key), key)
        assert part.initial_scale == whole.initial_scale
        assert part.is_stochastic == whole.is_stochastic


@pytest.mark.parametrize("name", ["unipc", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_sde"])
def test_a_run_that_begins_late_takes_nothing_of_steps_it_has_not_made(
    samplers: Samplers, name: str
) -> None:
    for begin in range(1, 12):
        table = samplers.table(name, 12, strength=(12 - begin) / 12)

        for weights in (table.correct[0], table.advance[0]):
            assert not weights[[LAST, *range(PREDICTION + 1, NOISE)]].any()
        np.testing.assert_array_equal(table.correct[0], uncorrected(1)[0])


def test_a_whole_is_the_part_that_begins_and_ends_with_it(samplers: Samplers) -> None:
    whole = samplers.table("unipc", 20)

    assert_equal(whole, samplers.table("unipc", 20, strength=1.0))
    assert_equal(whole, samplers.table("unipc", 20, denoising_start=0.0, denoising_end=1.0))


def test_the_start_of_denoising_counts_more_than_a_strength(samplers: Samplers) -> None:
    """But a start at 0 is none, as in diffusers."""
    started = samplers.table("ddim", 20, denoising_start=0.3)
    strong = samplers.table("ddim", 20, strength=0.5)

    assert_equal(started, samplers.table("ddim", 20, denoising_start=0.3, strength=0.5))
    assert_equal(strong, samplers.table("ddim", 20, denoising_start=0.0, strength=0.5))
    assert strong.num_steps != started.num_steps


def allowed_in(problem: str) -> tuple[float, float]:
    """The least and the most that a refusal says is allowed."""
    least, most = problem.split("allowed are ")[1].split(" to ")
    return float(least), float(most)


@pytest.mark.parametrize("name", ["unipc", "unipc_karras", "euler", "ddim"])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 7, 30, 49, 50])
def test_what_a_refusal_allows_is_allowed(samplers: Samplers, name: str, num_steps: int) -> None:
    def refusal(**choice: float) -> str:
        with pytest.raises(BadChoice) as caught:
            samplers.table(name, num_steps, **choice)
        return caught.value.problem

    for value in allowed_in(refusal(strength=0.001)):
        assert samplers.table(name, num_steps, strength=value).num_steps > 0
    for value in allowed_in(refusal(denoising_start=0.9999)):
        assert samplers.table(name, num_steps, denoising_start=value).num_steps > 0
    for strength in (0.5, 1.0):
        if num_steps * strength >= 1:
            late = {"strength": strength}
            for value in allowed_in(refusal(denoising_end=0.0001, **late)):
                assert samplers.table(name, num_steps, denoising_end=value, **late).num_steps > 0


def test_a_flow_offers_samplers_of_its_own(flow_samplers: Samplers) -> None:
    assert flow_samplers.names == ("euler", "unipc", "dpmpp_2m")

    with pytest.raises(BadChoice, match=r"'ddim' does not exist, there are euler, unipc, dpmpp_2m"):
        flow_samplers.table("ddim", 10)
    for name in flow_samplers.names:
        with pytest.raises(BadChoice, match=f"^timestep_spacing: {name} has timesteps of its own"):
            flow_samplers.table(name, 10, timestep_spacing="trailing")
        with pytest.raises(BadChoice, match=f"^eta: no sampler here takes it, not {name}$"):
            flow_samplers.table(name, 10, eta=0.5)
    with pytest.raises(
        BadChoice, match=r"^strength: 0 leaves none of 10 steps, allowed are above 0 to 1"
    ):
        flow_samplers.table("euler", 10, strength=0.0)


def test_a_flow_has_no_karras_levels() -> None:
    samplers = Samplers.from_config(FLOW, {"use_karras_sigmas": True})

    with pytest.raises(
        BadChoice, match="sampler: unipc: use_karras_sigmas: a flow schedule has no"
    ):
        samplers.table("unipc", 10)


def test_a_flow_may_end_at_its_least_noise() -> None:
    samplers = Samplers.from_config(FLOW, {"final_sigmas_type": "sigma_min"})
    table = samplers.table("unipc", 10)

    np.testing.assert_allclose(table.advance[-1], table.correct[-1], atol=1e-12)


def test_the_prediction_type_says_of_which_kind_a_schedule_is(manifest_document: dict) -> None:
    discrete = schedule_from_config(manifest_document["noise_schedule"])
    flow = schedule_from_config(FLOW)

    assert isinstance(discrete, NoiseSchedule)
    assert flow == FlowSchedule(shift=3.0, num_train_timesteps=1000)
    assert discrete.num_train_timesteps == flow.num_train_timesteps == 1000


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
        (
            "strength",
            "-0.1 is out of range, allowed are 0 to 1",
            {"name": "ddim", "strength": -0.1},
        ),
        ("strength", "1.5 is out of range, allowed are 0 to 1", {"name": "ddim", "strength": 1.5}),
        ("strength", "nan is out of range", {"name": "ddim", "strength": float("nan")}),
        (
            "strength",
            "0.09 leaves none of 10 steps, allowed are 0.1 to 1",
            {"name": "unipc", "strength": 0.09},
        ),
        (
            "denoising_start",
            "1 is out of range, allowed are 0 to below 1",
            {"name": "unipc", "denoising_start": 1.0},
        ),
        (
            "denoising_start",
            "0.95 leaves none of 10 steps, allowed are 0 to 0.899",
            {"name": "unipc", "denoising_start": 0.95},
        ),
        (
            "denoising_start",
            "0.5 is not below denoising_end, 0.5",
            {"name": "unipc", "denoising_start": 0.5, "denoising_end": 0.5},
        ),
        (
            "denoising_end",
            "0 is out of range, allowed are above 0 to 1",
            {"name": "unipc", "denoising_end": 0.0},
        ),
        (
            "denoising_end",
            "0.1 leaves no step from step 6 of 10 on, allowed are 0.5 to 1",
            {"name": "unipc", "denoising_end": 0.1, "strength": 0.5},
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
        "levels": np.ones((3, 2)),
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
            levels=np.ones((1, 2)),
            convert=np.ones((1, 2)),
            correct=uncorrected(1),
            advance=np.zeros((1, NUM_TERMS)),
            preview=np.array([[np.inf, 0.0]]),
        )
