import pytest

from benchmarks.measurements import Answer, Join, Round, percentiles, table


def answer(sent: float, answered: float, **timings: float) -> Answer:
    return Answer(sent, answered, timings)


def test_percentiles_lie_between_the_neighbouring_values():
    assert percentiles(range(101)) == {"p50": 50.0, "p90": 90.0, "p95": 95.0, "p99": 99.0}
    assert percentiles([1.0, 2.0])["p50"] == 1.5
    assert percentiles([7.0])["p99"] == 7.0


def test_a_round_lasts_from_the_first_request_to_the_last_answer():
    measured = Round([answer(11.0, 14.0), answer(10.0, 12.0)])

    assert measured.wall_s == 4.0
    assert measured.pictures_per_s == 0.5


def test_latency_counts_from_sending_and_waiting_from_the_start_of_the_round():
    in_a_row = Round([answer(10.0, 11.0), answer(11.0, 12.0), answer(12.0, 13.0)])

    assert in_a_row.latency_ms()["p50"] == 1000.0
    assert in_a_row.wait_ms()["p50"] == 2000.0


def test_the_record_of_a_round_counts_from_its_start():
    record = Round([answer(10.0, 10.5, queue_ms=3.0), answer(10.25, 11.0)]).result()

    assert record["wall_s"] == 1.0
    assert record["answers"] == [
        {"sent_s": 0.0, "answered_s": 0.5, "queue_steps": 0, "queue_ms": 3.0},
        {"sent_s": 0.25, "answered_s": 1.0, "queue_steps": 0},
    ]


def test_the_delay_of_a_join_is_its_time_in_the_queue_in_steps_of_the_long_request():
    join = Join(
        long=answer(0.0, 1.0, denoise_ms=600.0),
        short=answer(0.2, 0.4, queue_ms=15.0),
        long_steps=60,
    )

    assert join.step_ms == 10.0
    assert join.delay_steps == 1.5


@pytest.mark.parametrize(
    ("short", "expected"),
    [
        pytest.param((0.2, 0.4), True, id="inside"),
        pytest.param((0.8, 1.2), False, id="outlives the long one"),
        pytest.param((-0.1, 0.4), False, id="sent before the long one"),
    ],
)
def test_a_join_overlaps_when_the_short_request_is_inside_the_long_one(short, expected):
    assert Join(answer(0.0, 1.0), answer(*short), 60).is_overlapping is expected


def test_a_table_aligns_names_left_and_numbers_right():
    text = table(["name", "ms"], [["a", "1"], ["longer", "100"]])

    assert text.splitlines() == ["name     ms", "------  ---", "a         1", "longer  100"]
