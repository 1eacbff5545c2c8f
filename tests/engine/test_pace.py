"""The time of a step, learned from steps."""

import pytest

from darkroom_engine.pace import Pace

SHAPE, DOUBLE = (4, 8, 8), (4, 8, 16)


def test_nothing_is_known_before_the_first_step() -> None:
    pace = Pace()

    assert pace.step_s(SHAPE, 16) == 0
    assert pace.steps_s(SHAPE, 10, 20) == 0
    assert pace.decode_s(SHAPE) == 0


def test_one_size_is_taken_in_proportion() -> None:
    pace = Pace()
    pace.record_step(SHAPE, 2, 0.2)

    assert pace.step_s(SHAPE, 6) == pytest.approx(0.6)
    assert pace.step_s(DOUBLE, 3) == pytest.approx(0.6)


def test_a_constant_part_is_found() -> None:
    pace = Pace()
    for num_rows in (1, 2, 8, 16, 4):
        pace.record_step(SHAPE, num_rows, 0.5 + 0.01 * num_rows)

    assert pace.step_s(SHAPE, 32) == pytest.approx(0.82)


@pytest.mark.parametrize("times", [{1: 1.0, 8: 0.5}, {1: 0.1, 8: 10.0}])
def test_no_part_is_ever_negative(times: dict[int, float]) -> None:
    pace = Pace()
    for num_rows, seconds in times.items():
        pace.record_step(SHAPE, num_rows, seconds)

    assert pace.step_s(SHAPE, 0) >= 0
    assert pace.step_s(SHAPE, 1000) >= pace.step_s(SHAPE, 1) > 0


def test_a_change_is_learned() -> None:
    pace = Pace()
    for _ in range(200):
        pace.record_step(SHAPE, 4, 1.0)
    for _ in range(200):
        pace.record_step(SHAPE, 4, 0.1)

    assert pace.step_s(SHAPE, 4) == pytest.approx(0.1, rel=0.2)


def test_steps_and_their_rows_are_counted_apart() -> None:
    pace = Pace()
    for num_rows in (1, 2, 8, 16):
        pace.record_step(SHAPE, num_rows, 0.5 + 0.01 * num_rows)

    assert pace.steps_s(SHAPE, 10, 40) == pytest.approx(5.4)
    assert pace.steps_s(DOUBLE, 10, 40) == pytest.approx(5.8)


def test_a_machine_that_was_held_up_is_soon_forgotten() -> None:
    pace = Pace()
    for _ in range(100):
        pace.record_step(SHAPE, 4, 0.1)
        pace.record_decode(SHAPE, 0.2)
    pace.record_step(SHAPE, 4, 60.0)
    pace.record_decode(SHAPE, 60.0)

    assert pace.step_s(SHAPE, 4) < 0.12
    assert pace.decode_s(SHAPE) < 0.4


def test_decoding_goes_by_area() -> None:
    pace = Pace()
    pace.record_decode(DOUBLE, 3.0)

    assert pace.decode_s(SHAPE) == pytest.approx(1.5)
    pace.record_decode(DOUBLE, 1.0)
    assert 0.5 < pace.decode_s(SHAPE) < 1.5
