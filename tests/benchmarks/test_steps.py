import pytest

from benchmarks.steps import SETTLING_STEPS, Phase, same_rows_ms, split


def test_the_steps_of_a_phase_are_the_gaps_between_arrivals():
    phase = Phase([1.0, 1.5, 2.5])

    assert phase.step_ms == [500.0, 1000.0]
    assert phase.num_steps == 2
    assert phase.wall_s == 1.5
    assert phase.mean_ms == 750.0


@pytest.mark.parametrize(("at_s", "expected"), [(0.9, False), (1.0, True), (2.5, True), (3, False)])
def test_a_phase_lasts_from_its_first_arrival_to_its_last(at_s, expected):
    assert Phase([1.0, 1.5, 2.5]).holds(at_s) is expected


def test_phases_leave_out_the_steps_in_which_all_settles():
    stamps = [float(n) for n in range(20)]

    first, second = split(stamps, [0, 10, 20])

    assert first.arrived_s == stamps[SETTLING_STEPS:10]
    assert second.arrived_s == stamps[10 + SETTLING_STEPS : 20]


def test_a_phase_without_steps_is_named():
    with pytest.raises(ValueError, match="steps 10 to 13 are too few"):
        split([float(n) for n in range(20)], [0, 10, 13])


@pytest.mark.parametrize(("rows_per_step", "expected"), [(0.0, 100.0), (1.0, 130.0), (2.0, 160.0)])
def test_the_baseline_lies_between_no_more_rows_and_all_of_them(rows_per_step, expected):
    assert same_rows_ms(100.0, 160.0, 2, rows_per_step) == expected
