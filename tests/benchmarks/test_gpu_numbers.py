"""What is computed of measurements on a GPU, and how requests are sent to be measured."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from engine_harness import (  # noqa: F401  # noqa: F401
    Harness,
    harness,
    make_engine,
    manifest,
    manifest_document,
    networks,
    repository,
)
from fake_networks import FakeNetworks

from benchmarks.gpu.grouping import Grouping, Kind, Waiting, kind_of
from benchmarks.gpu.load import send
from benchmarks.gpu.report import text
from benchmarks.gpu.service import Grouped, Ours, keep_full
from benchmarks.gpu.session import Session
from benchmarks.gpu.summary import (
    Solo,
    Visit,
    compare_latents,
    compare_pictures,
    describe_load,
    psnr,
    spread,
    steady_rate,
)
from benchmarks.workload import Request

WAIT_S = 30.0
ROOT = Path(__file__).parents[2]


def request(seed=0, steps=4, guidance_scale=5.0):
    return Request("a cat", seed, steps, guidance_scale)


class TestSummary:
    def test_a_spread_has_median_and_ends(self):
        result = spread([3.0, 1.0, 2.0, 10.0])

        assert result == {"median": 2.5, "min": 1.0, "max": 10.0, "count": 4}

    def test_psnr_is_that_of_the_mean_squared_error(self):
        reference = np.zeros((2, 2), np.uint8)

        assert psnr(reference + 16, reference, 255.0) == pytest.approx(24.05, abs=0.01)

    def test_equal_arrays_have_no_psnr(self):
        latents = np.ones((4, 2, 2), np.float32)

        assert psnr(latents, latents, 1.0) is None

    def test_levels_do_not_wrap_around(self):
        dark, bright = np.zeros((1, 1, 3), np.uint8), np.full((1, 1, 3), 250, np.uint8)

        assert compare_pictures(dark, bright)["max_levels"] == 250

    def test_latents_are_compared_on_the_range_of_the_reference(self):
        reference = np.array([-2.0, 2.0], np.float32)

        result = compare_latents(reference + np.float32(0.4), reference)

        assert result == {"max_abs": pytest.approx(0.4), "range": 4.0, "psnr_db": 20.0}

    def test_what_is_not_finite_is_not_taken_for_equal(self):
        reference = np.zeros(4, np.float32)
        broken = np.array([0, 0, 0, np.nan], np.float32)

        assert np.isnan(psnr(broken, reference, 1.0))

    def test_lone_requests_lie_on_a_line_by_steps(self):
        solo = Solo(10, 50, short_s={True: 1.0, False: 0.5}, long_s={True: 5.0, False: 2.5})

        assert solo.seconds(30, is_guided=True) == pytest.approx(3.0)
        assert solo.seconds(10, is_guided=False) == pytest.approx(0.5)

    def test_a_rate_is_counted_between_its_answers(self):
        answers = [0.5, 2.0, 3.0, 4.0, 9.0]

        assert steady_rate(answers, 1.0, 5.0) == pytest.approx(1.0)

    @pytest.mark.parametrize("answers", [[], [2.0], [2.0, 2.0]])
    def test_too_few_answers_have_no_rate(self, answers):
        assert steady_rate(answers, 1.0, 5.0) is None

    def test_a_request_is_in_time_within_three_times_what_it_takes_alone(self):
        visits = [Visit(0.0, 3.0, 10, True), Visit(1.0, 4.1, 10, True)]

        result = describe_load(visits, end_s=10.0, window_s=2.0, solo_s=lambda _: 1.0)

        assert result["share_in_time"] == 0.5
        assert result["goodput_per_s"] == 0.5
        assert result["offered_per_s"] == 1.0

    def test_a_request_that_was_given_up_took_until_then_and_is_not_in_time(self):
        visits = [Visit(1.0, None, 10, False)]

        result = describe_load(visits, end_s=5.0, window_s=2.0, solo_s=lambda _: 100.0)

        assert result["num_unfinished"] == 1
        assert result["latency_s"]["p50"] == 4.0
        assert result["share_in_time"] == 0.0
        assert result["visits"] == [[1.0, None, 10, False]]


class TestGrouping:
    grouping = Grouping(max_rows=8, window_s=0.05)

    def test_what_is_equal_has_steps_and_guidance_in_common(self):
        assert kind_of(request(guidance_scale=1.0)) == Kind(4, is_guided=False)
        assert kind_of(request(seed=7)) == kind_of(request(guidance_scale=9.0))
        assert kind_of(request(guidance_scale=None)).is_guided

    def test_the_oldest_waits_for_the_window(self):
        queue = [Waiting(request(), 1.0)]

        assert self.grouping.next_group(queue, 1.04) == []
        assert self.grouping.wait_s(queue, 1.04) == pytest.approx(0.01)
        assert self.grouping.next_group(queue, 1.06) == queue

    def test_it_takes_its_equals_along_and_no_others(self):
        old, other, equal = (
            Waiting(request(1), 1.0),
            Waiting(request(2, steps=5), 1.01),
            Waiting(request(3), 1.02),
        )

        assert self.grouping.next_group([old, other, equal], 1.1) == [old, equal]

    def test_a_full_group_does_not_wait(self):
        queue = [Waiting(request(n), 1.0) for n in range(6)]

        assert self.grouping.next_group(queue, 1.0) == queue[:4]

    def test_what_is_not_guided_takes_one_row(self):
        queue = [Waiting(request(n, guidance_scale=0.0), 1.0) for n in range(12)]

        assert self.grouping.next_group(queue, 1.0) == queue[:8]

    def test_one_at_a_time_never_waits(self):
        queue = [Waiting(request(n), 1.0) for n in range(3)]
        grouping = Grouping(max_rows=8, window_s=0.05, max_pictures=1)

        assert grouping.next_group(queue, 1.0) == queue[:1]

    def test_an_empty_queue_has_no_group(self):
        assert self.grouping.next_group([], 1.0) == []
        assert self.grouping.wait_s([], 1.0) is None


@pytest.fixture
def ours(manifest, networks):  # noqa: F811
    made = Ours(manifest, networks, max_rows=8)
    made.start()
    yield made
    networks.gate.set()
    made.close()


class TestServices:
    def test_an_answer_tells_its_picture_and_its_time(self, ours):
        answer = ours.submit(request()).result(WAIT_S)

        assert answer.picture[:2] == b"\xff\xd8"
        assert answer.timings["denoise_ms"] > 0

    def test_what_is_submitted_together_makes_all_its_steps_together(self, ours):
        for future in ours.submit_together([request(n) for n in range(4)]):
            future.result(WAIT_S)

        assert [step.num_rows for step in ours.recorder.steps] == [8] * 4

    def test_groups_run_one_after_the_other(self, ours):
        with Grouped(ours, Grouping(max_rows=8, window_s=0.0)) as service:
            with ours.at_once():
                futures = [service.submit(request(n, steps=3 + n % 2)) for n in range(4)]
            for future in futures:
                future.result(WAIT_S)

        # A step of three and one of four never share a call.
        assert {step.num_rows for step in ours.recorder.steps} <= {2, 4}
        assert sum(step.num_rows for step in ours.recorder.steps) == 2 * (3 + 4 + 3 + 4)

    def test_one_at_a_time_has_the_rows_of_one_request(self, ours):
        with Grouped(ours, Grouping(max_rows=8, window_s=0.0, max_pictures=1)) as service:
            for future in [service.submit(request(n)) for n in range(3)]:
                future.result(WAIT_S)

        assert [step.num_rows for step in ours.recorder.steps] == [2] * 12

    def test_a_failure_reaches_who_asked(self, ours):
        with Grouped(ours, Grouping(max_rows=8, window_s=0.0)) as service:
            error = service.submit(request(steps=1000)).exception(WAIT_S)

            assert "num_inference_steps" in str(error)
            # And the next one runs.
            service.submit(request()).result(WAIT_S)

    def test_an_engine_is_kept_full_until_the_time_is_over(self, ours):
        requests = (request(n) for n in itertools.count())

        answers = keep_full(ours, requests, concurrency=4, seconds=0.5)

        assert len(answers) > 4
        assert ours.submit(request()).result(WAIT_S)

    def test_requests_are_sent_when_they_are_due_and_all_answered(self, ours):
        visits, end_s = send(ours, [request(n) for n in range(3)], [0.0, 0.01, 0.05], WAIT_S)

        assert [visit.arrived_s for visit in visits] == [0.0, 0.01, 0.05]
        assert all(visit.arrived_s < visit.answered_s <= end_s for visit in visits)

    def test_what_is_not_answered_in_time_is_given_up(self, ours, networks: FakeNetworks):  # noqa: F811
        networks.gate.clear()
        opened = []

        class Opening:
            """The engine's step ends while what waits is given up."""

            def submit(self, one):
                return ours.submit(one)

            def give_up(self):
                networks.gate.set()
                opened.append(True)
                ours.give_up()

        visits, _ = send(Opening(), [request()], [0.0], 0.1)

        assert opened
        assert visits[0].answered_s is None


class TestSession:
    def test_a_part_that_fails_leaves_its_error_and_the_next_runs(self, tmp_path):
        session = Session(tmp_path / "gpu.json", {"models": {}}, 60)
        store = {}
        session.run("sd15/solo", 0, lambda: 1 / 0, store)
        session.run("sd15/join", 0, lambda: {"steps": 1}, store)
        session.close()

        written = json.loads((tmp_path / "gpu.json").read_text())
        assert session.num_failed == 1
        assert written["errors"] == {"sd15/solo": "ZeroDivisionError: division by zero"}
        assert store == {"join": {"steps": 1}}
        assert "FAILED sd15/solo: ZeroDivisionError" in text(written)

    def test_a_part_that_takes_longer_than_is_left_is_dropped_with_a_note(self, tmp_path):
        session = Session(tmp_path / "gpu.json", {}, 10)
        store = {}
        session.run("sd15/load", 90, lambda: pytest.fail("must not run"), store)
        session.close()

        assert store == {}
        (note,) = json.loads((tmp_path / "gpu.json").read_text())["notes"]
        assert note.startswith("sd15/load: dropped, ")

    def test_rounds_end_with_the_time_but_there_is_one(self, tmp_path):
        session = Session(tmp_path / "gpu.json", {}, 0)

        assert list(session.rounds(5)) == [0]
        session.close()
        assert "1 of 5 rounds" in session.result["notes"][0]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--budget", "soon"], "'soon' is not a whole number"),
        (["--budget="], "'' is not a whole number"),
        (["--small", "--wheels"], "--wheels needs a value"),
    ],
)
def test_the_script_names_a_bad_argument(arguments, problem):
    command = [str(ROOT / "benchmarks" / "gpu.sh"), *arguments]

    result = subprocess.run(command, check=False, capture_output=True, text=True)

    assert result.returncode == 2
    assert problem in result.stderr


def test_the_script_names_a_folder_without_wheels(tmp_path):
    command = [str(ROOT / "benchmarks" / "gpu.sh"), "--wheels", str(tmp_path)]
    environment = {**os.environ, "PYTHON": sys.executable}

    result = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)

    assert result.returncode == 1
    assert f"{tmp_path}: no wheels" in result.stderr
