"""Who runs next: those that came first and those that have least left, by turns."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from engine_harness import LIMITS

from darkroom_engine import ImageRequest, InvalidRequest, Job, Overloaded
from darkroom_engine.pace import Pace
from darkroom_engine.sample import Group, Sample
from darkroom_engine.schedule import NoiseSchedule
from darkroom_engine.scheduler import Scheduler
from darkroom_engine.solver import SolverTable
from darkroom_engine.unipc import UniPC

SMALL, LARGE = (4, 8, 8), (4, 16, 16)
SCHEDULE = NoiseSchedule(tuple(0.01 + n / 50 for n in range(1000)), "epsilon", "linspace")
STEP_S = 0.1
"""What a step of the small shape takes here, whatever its rows."""


def table(num_steps: int) -> SolverTable:
    return UniPC().table(SCHEDULE, num_steps)


@pytest.fixture
def clock() -> Iterator[Callable[[], float]]:
    return itertools.count(1000.0, 0.001).__next__


@pytest.fixture
def pace() -> Pace:
    pace = Pace()
    for num_rows in (1, 16):
        pace.record_step(SMALL, num_rows, STEP_S)
    return pace


class Queue:
    """A scheduler, and a few words to talk with it."""

    def __init__(self, pace: Pace, clock: Callable[[], float], **options: Any) -> None:
        settings = {"max_rows": 4, "max_queue_size": 100, "seconds_per_priority": 10} | options
        max_rows = settings.pop("max_rows")
        self.scheduler = Scheduler(lambda _: max_rows, **settings, pace=pace)
        self.clock = clock

    def add(
        self, num_steps: int, shape: tuple[int, int, int] = SMALL, count: int = 1, **fields: Any
    ) -> list[Sample]:
        values = {"guidance_scale": 1.0, "num_images_per_prompt": count} | fields
        request = ImageRequest.parse(
            {"prompt": b"", "num_inference_steps": num_steps, **values},
            replace(LIMITS, max_num_inference_steps=1000),
        )
        job = Job(request, lambda _: None)
        job.submitted_at = self.clock()
        guided = request.guided_steps(num_steps)
        group = Group("unet", shape)
        samples = [Sample(job, n, table(num_steps), group, guided) for n in range(count)]
        self.scheduler.submit(samples)
        return samples

    def wait(self, seconds: float) -> None:
        for _ in range(int(seconds / 0.001)):
            self.clock()

    def turn(self) -> list[Sample]:
        """Make a step of the next batch."""
        batch = self.scheduler.next_batch(self.clock())
        for sample in batch:
            sample.is_started = True
            sample.step += 1
        self.scheduler.remove(sample for sample in batch if sample.is_finished)
        return batch


@pytest.fixture
def queue(pace: Pace, clock: Callable[[], float]) -> Queue:
    return Queue(pace, clock)


def test_equal_requests_run_in_order_of_arrival(queue: Queue) -> None:
    samples = [sample for _ in range(6) for sample in queue.add(5)]

    assert queue.turn() == samples[:4]
    assert queue.turn() == samples[:4]


def test_a_short_request_does_not_wait_for_the_end_of_long_ones(queue: Queue) -> None:
    long = [sample for _ in range(4) for sample in queue.add(150)]
    queue.turn()
    (short,) = queue.add(4)

    # Every second step is for those that have least left.
    assert [short in queue.turn() for _ in range(8)].count(True) == 4
    assert short.is_finished
    # The one that made room went on where it was.
    assert sorted(sample.step for sample in long) == [5, 9, 9, 9]


def test_however_late_long_ones_are_no_short_one_waits_for_their_end(queue: Queue) -> None:
    long = [sample for _ in range(4) for sample in queue.add(60)]
    waits = []
    while not all(sample.is_finished for sample in long):
        (short,) = queue.add(4)
        batches = []
        while not short.is_finished:
            batches.append(queue.turn())
            queue.wait(STEP_S)
        waits.append([short in batch for batch in batches].index(True))

    assert max(waits) <= 1


def test_a_long_request_is_not_overtaken_for_ever(queue: Queue) -> None:
    """Short ones that would take all rows come in without end."""
    (long,) = queue.add(40)
    num_turns = 0
    while not long.is_finished:
        if num_turns % 4 == 0:
            queue.add(4, count=4)
        queue.turn()
        queue.wait(STEP_S)
        num_turns += 1
        assert num_turns < 40 * 4


def test_a_higher_priority_overtakes_those_that_run(queue: Queue) -> None:
    low = [sample for _ in range(4) for sample in queue.add(20)]
    queue.turn()
    high = queue.add(20, priority=1)

    assert queue.turn()[0] == high[0]
    assert len(set(queue.turn()) & set(low)) == 3


def test_a_lower_priority_is_not_overtaken_for_ever(queue: Queue) -> None:
    """A level of priority is ten seconds, and so two of them are after 20 no advantage any more."""
    (low,) = queue.add(5)
    num_turns = 0
    while not low.is_finished:
        if num_turns % 5 == 0:
            queue.add(5, count=4, priority=2)
        queue.turn()
        queue.wait(1.0)
        num_turns += 1
        assert num_turns < 40
    assert num_turns > 20


def test_a_priority_of_no_seconds_is_none(pace: Pace, clock: Callable[[], float]) -> None:
    queue = Queue(pace, clock, seconds_per_priority=0, max_rows=2)
    first = queue.add(5) + queue.add(5)
    queue.add(5, priority=10)

    assert queue.turn() == first


def test_a_small_one_fills_a_gap_but_does_not_take_the_turn(
    pace: Pace, clock: Callable[[], float]
) -> None:
    queue = Queue(pace, clock, max_rows=2)
    (first,) = queue.add(5)
    (wide,) = queue.add(5, guidance_scale=5.0)
    (last,) = queue.add(9)

    assert queue.turn() == [first, last]
    queue.scheduler.remove([first])
    assert queue.turn() == [wide]


def test_rows_follow_the_guidance_interval(queue: Queue) -> None:
    (sample,) = queue.add(8, guidance_scale=5.0, guidance_start=0.25, guidance_stop=0.75)
    rows = []
    assert sample.num_row_steps == 12
    while not sample.is_finished:
        rows.append(sample.num_rows)
        queue.turn()

    assert rows == [1, 1, 2, 2, 2, 2, 1, 1]
    assert sample.num_row_steps == 0


def test_shapes_take_turns(queue: Queue) -> None:
    small = [sample for _ in range(4) for sample in queue.add(9)]
    (large,) = queue.add(9, shape=LARGE)

    assert [queue.turn() for _ in range(4)] == [small, [large], small, [large]]


def test_positions_count_who_starts_before(queue: Queue) -> None:
    running = [sample for _ in range(4) for sample in queue.add(20)]
    queue.turn()
    first, second = queue.add(30)[0], queue.add(30)[0]
    (other,) = queue.add(20, shape=LARGE)
    (urgent,) = queue.add(30, priority=1)

    positions = queue.scheduler.positions()
    assert {sample: positions[sample] for sample in (urgent, first, second, other)} == {
        urgent: 0,
        first: 1,
        second: 2,
        other: 0,
    }
    assert not set(positions) & set(running)


def test_what_has_started_does_not_count_as_waiting(pace: Pace, clock: Callable[[], float]) -> None:
    queue = Queue(pace, clock, max_queue_size=4)
    queue.add(9, count=4)
    with pytest.raises(Overloaded, match="4 pictures are waiting, 4 may wait"):
        queue.add(9)
    queue.turn()

    assert queue.add(9, count=4)
    assert (queue.scheduler.num_waiting, queue.scheduler.num_running) == (4, 4)


def test_what_was_cancelled_makes_room_at_once(pace: Pace, clock: Callable[[], float]) -> None:
    queue = Queue(pace, clock, max_queue_size=4)
    samples = queue.add(9, count=4)
    samples[0].job.cancel()

    assert queue.add(9, count=4)


def test_a_retry_hint_is_the_time_until_there_is_room(
    pace: Pace, clock: Callable[[], float]
) -> None:
    """Eight pictures of ten steps, four at a time: two seconds, so that one leaves every 0.25."""
    queue = Queue(pace, clock, max_queue_size=8)
    queue.add(10, count=8)

    with pytest.raises(Overloaded) as caught:
        queue.add(10, count=2)
    assert caught.value.retry_after_s == pytest.approx(0.5, rel=0.01)


def test_a_deadline_that_cannot_be_kept_is_refused(queue: Queue) -> None:
    """Twelve pictures of ten steps, four at a time, are three seconds of work.

    By the time that they are done, others may have had as much.
    """
    queue.add(10, count=4)
    queue.add(10, count=4)

    with pytest.raises(Overloaded, match=r"timeout_ms: 5500 cannot be kept, about 6000 ms") as it:
        queue.add(10, count=4, timeout_ms=5500)
    assert it.value.retry_after_s == pytest.approx(0.5, rel=0.01)
    assert queue.add(10, count=4, timeout_ms=6500)


def test_a_deadline_is_not_judged_by_work_that_comes_later(queue: Queue) -> None:
    for _ in range(8):
        queue.add(150)

    assert queue.add(4, timeout_ms=1000)


def test_a_deadline_counts_what_runs_beside_it_only_once(queue: Queue) -> None:
    """A long picture ahead takes one row of the four, and does not hold up a short one."""
    queue.add(150, priority=10)

    assert queue.add(4, timeout_ms=600)


def test_a_deadline_counts_of_other_shapes_only_their_turns(queue: Queue) -> None:
    queue.add(150, shape=LARGE, count=8)
    queue.add(150, shape=LARGE, count=8)

    # Every second turn is its own.
    assert queue.add(10, timeout_ms=2500)
    with pytest.raises(Overloaded):
        queue.add(10, timeout_ms=1500)


def test_more_pictures_than_may_ever_wait_are_no_matter_of_time(
    pace: Pace, clock: Callable[[], float]
) -> None:
    queue = Queue(pace, clock, max_queue_size=4)

    with pytest.raises(
        InvalidRequest, match="num_images_per_prompt: 5 are more than may wait, allowed are 1 to 4"
    ):
        queue.add(5, count=5)


def test_a_deadline_that_comes_near_goes_before_both_orders(queue: Queue) -> None:
    """Others of a higher priority, long and short, would take all rows until it is too late."""
    (due,) = queue.add(20, timeout_ms=5000)
    for _ in range(4):
        queue.add(60, priority=1)
        queue.add(50, priority=1)
    num_turns = 0
    while not due.is_finished:
        queue.turn()
        queue.wait(STEP_S)
        num_turns += 1

    # Not at once, but in time.
    assert 30 < num_turns <= 50


def test_with_nothing_before_it_any_deadline_may_be_tried(queue: Queue) -> None:
    assert queue.add(100, timeout_ms=1)


def test_retire_drops_what_was_answered(queue: Queue) -> None:
    gone, stays = queue.add(5)[0], queue.add(5)[0]
    gone.job.cancel()
    queue.scheduler.retire()

    assert queue.scheduler.samples() == [stays]
    assert queue.scheduler.has_work
