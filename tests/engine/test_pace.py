"""The time of a step, learned from steps."""

from dataclasses import dataclass

import pytest

from darkroom_engine.pace import Pace

SHAPE, DOUBLE = (4, 8, 8), (4, 8, 16)


@dataclass
class Left:
    num_steps_left: int
    num_row_steps: int
    latent_shape: tuple[int, int, int] = SHAPE


def test_nothing_is_known_before_the_first_step() -> None:
    pace = Pace()

    assert pace.step_s(SHAPE, 16) == 0
    assert pace.seconds_for([Left(10, 20)], lambda _: 16) == 0


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


def test_work_is_counted_in_full_batches_but_not_shorter_than_its_longest() -> None:
    pace = Pace()
    for num_rows in (1, 16):
        pace.record_step(SHAPE, num_rows, 0.1)

    assert pace.seconds_for([Left(10, 20)], lambda _: 4) == pytest.approx(1.0)
    assert pace.seconds_for([Left(10, 20)] * 4, lambda _: 4) == pytest.approx(2.0)


def test_decoding_comes_on_top() -> None:
    pace = Pace()
    pace.record_step(SHAPE, 1, 0.1)
    pace.record_decode(DOUBLE, 3.0)

    assert pace.seconds_for([Left(10, 10)], lambda _: 4) == pytest.approx(1.0 + 1.5)
