"""A picture is the same whatever its neighbours, and neighbours come and go at every step."""

import random
from collections.abc import Callable
from typing import Any

import pytest
from engine_harness import WAIT_S, Harness

SAMPLERS = (
    *("unipc", "unipc_karras", "dpmpp_2m", "dpmpp_2m_karras", "dpmpp_2m_sde"),
    *("dpmpp_2m_sde_karras", "dpmpp_sde", "dpmpp_sde_karras", "euler", "euler_ancestral"),
    *("ddim", "lcm", "tcd"),
)

REQUESTS: list[dict[str, Any]] = [
    {
        "prompt": f"prompt {n}",
        "negative_prompt": ["", "blurry"][n % 2],
        "num_inference_steps": 2 + 3 * n % 23,
        "guidance_scale": [0.0, 1.0, 2.5, 7.0][n % 4],
        "sampler": SAMPLERS[n % len(SAMPLERS)],
        "seed": n * 1000,
        "guidance_rescale": [0.0, 0.7][n % 5 == 0],
        "guidance_start": [0.0, 0.25][n % 3 == 0],
        "guidance_stop": [1.0, 0.5][n % 7 == 0],
        "clip_skip": n % 3,
        **({"eta": 0.8} if SAMPLERS[n % len(SAMPLERS)] in ("ddim", "tcd") else {}),
    }
    for n in range(16)
]


def solo_pictures(harness: Harness, requests: list[dict[str, Any]]) -> list[bytes]:
    return [harness.picture(**request) for request in requests]


def test_a_full_batch_equals_solo_runs_exactly(make_engine: Callable[..., Harness]) -> None:
    harness = make_engine(max_rows=32)
    solo = solo_pictures(harness, REQUESTS)
    harness.networks.step_rows.clear()

    harness.networks.gate.clear()
    futures = [harness.ask(**request) for request in REQUESTS]
    harness.networks.gate.set()
    together = [future.result(WAIT_S).pictures[0] for future in futures]

    assert solo == together
    assert max(harness.networks.step_rows) > len(REQUESTS)


@pytest.mark.parametrize("seed", range(5))
def test_joining_and_leaving_at_any_step_changes_nothing(
    make_engine: Callable[..., Harness], seed: int
) -> None:
    harness = make_engine(max_rows=7)
    solo = solo_pictures(harness, REQUESTS)
    order = random.Random(seed).sample(range(len(REQUESTS)), len(REQUESTS))

    futures = {}
    for n in order:
        futures[n] = harness.ask(**REQUESTS[n])
        if n % 3 == 0:
            futures[order[0]].result(WAIT_S)
    together = [futures[n].result(WAIT_S).pictures[0] for n in range(len(REQUESTS))]

    assert solo == together


def test_a_newcomer_joins_the_running_batch_at_the_next_step(harness: Harness) -> None:
    harness.picture()
    harness.networks.step_rows.clear()
    harness.networks.is_entered.clear()
    harness.networks.gate.clear()
    long = harness.ask(num_inference_steps=40, guidance_scale=1.0)
    harness.networks.is_entered.wait(WAIT_S)
    short = harness.ask(num_inference_steps=3, guidance_scale=1.0)
    harness.networks.gate.set()

    assert short.result(WAIT_S).info["queue_steps"] == 0
    long.result(WAIT_S)

    assert harness.networks.step_rows == [1, 2, 2, 2, *[1] * 36]


def test_all_samplers_are_in_the_mixed_batch(harness: Harness) -> None:
    assert harness.engine.limits.samplers == SAMPLERS


def test_rows_are_never_more_than_allowed(make_engine: Callable[..., Harness]) -> None:
    harness = make_engine(max_rows=5)
    futures = [harness.ask(**request) for request in REQUESTS]
    for future in futures:
        future.result(WAIT_S)

    assert max(harness.networks.step_rows) <= 5


def test_pictures_of_one_request_are_those_of_its_seeds(harness: Harness) -> None:
    result = harness.ask(seed=40, num_images_per_prompt=3).result(WAIT_S)

    assert result.seeds == [40, 41, 42]
    assert result.pictures == [harness.picture(seed=seed) for seed in result.seeds]


def test_equal_requests_at_once_give_equal_pictures(harness: Harness) -> None:
    futures = [harness.ask(seed=0) for _ in range(5)]

    assert len({future.result(WAIT_S).pictures[0] for future in futures}) == 1


def test_other_shapes_take_turns_in_the_same_engine(harness: Harness) -> None:
    sizes = [(64, 64), (32, 64), (64, 32), (128, 128)]
    solo = [harness.picture(width=w, height=h, num_inference_steps=9) for w, h in sizes]

    futures = [harness.ask(width=w, height=h, num_inference_steps=9) for w, h in sizes]

    assert solo == [future.result(WAIT_S).pictures[0] for future in futures]


def test_no_shape_starves_another(make_engine: Callable[..., Harness]) -> None:
    """While one shape keeps the engine full, a picture of another shape gets every other step."""
    harness = make_engine(max_rows=4)
    harness.picture()
    harness.networks.gate.clear()
    for seed in range(12):
        harness.ask(num_inference_steps=30, seed=seed)
    lonely = harness.ask(width=32, height=32, num_inference_steps=5, guidance_scale=1.0)
    harness.networks.step_rows.clear()
    harness.networks.gate.set()
    lonely.result(WAIT_S)

    own = [turn for turn, rows in enumerate(harness.networks.step_rows) if rows == 1]
    assert len(own) == 5
    assert own[-1] <= 2 * len(own)
