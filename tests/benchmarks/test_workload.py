import json

import pytest

from benchmarks.workload import (
    Request,
    make_requests,
    perf_analyzer_input,
    poisson_arrivals,
)


def test_the_same_seed_makes_the_same_requests():
    requests = make_requests(16, seed=3, steps=(4, 40))

    assert requests == make_requests(16, seed=3, steps=(4, 40))
    assert requests != make_requests(16, seed=4, steps=(4, 40))


def test_requests_differ_in_prompt_and_seed():
    requests = make_requests(16, seed=0, steps=(20, 20))

    assert len({request.prompt for request in requests}) > 12
    assert len({request.seed for request in requests}) == 16


def test_steps_are_spread_over_the_whole_range_in_mixed_order():
    steps = [request.num_inference_steps for request in make_requests(37, seed=0, steps=(4, 40))]

    assert sorted(steps) == list(range(4, 41))
    assert steps != sorted(steps)


def test_one_request_takes_the_lowest_step_count():
    (request,) = make_requests(1, seed=0, steps=(4, 40))

    assert request.num_inference_steps == 4


def test_guidance_scales_come_in_turn():
    requests = make_requests(6, seed=0, steps=(4, 40), guidance_scales=(0.0, 1.0, 7.0))

    assert [request.guidance_scale for request in requests] == [0.0, 1.0, 7.0] * 2


def test_arrivals_come_in_order_within_the_time_at_the_rate():
    arrivals = poisson_arrivals(20.0, 100.0, seed=1)

    assert arrivals == sorted(arrivals)
    assert arrivals[0] > 0.0
    assert arrivals[-1] < 100.0
    assert len(arrivals) == pytest.approx(2000, rel=0.1)


def test_the_same_seed_makes_the_same_arrivals():
    arrivals = poisson_arrivals(20.0, 10.0, seed=1)

    assert arrivals == poisson_arrivals(20.0, 10.0, seed=1)
    assert arrivals != poisson_arrivals(20.0, 10.0, seed=2)


def test_the_input_of_perf_analyzer_has_one_tensor_of_shape_1_for_each_field():
    request = Request('a "red" circle', seed=2**32, num_inference_steps=5, guidance_scale=0.0)

    content = perf_analyzer_input([request])

    assert content == {
        "data": [
            {
                "prompt": {"content": ['a "red" circle'], "shape": [1]},
                "seed": {"content": [2**32], "shape": [1]},
                "num_inference_steps": {"content": [5], "shape": [1]},
                "guidance_scale": {"content": [0.0], "shape": [1]},
            }
        ]
    }
    assert json.loads(json.dumps(content)) == content


def test_the_input_of_perf_analyzer_leaves_out_what_the_server_decides():
    (entry,) = perf_analyzer_input(make_requests(1, seed=0, steps=(4, 4)))["data"]

    assert entry.keys() == {"prompt", "seed", "num_inference_steps"}
