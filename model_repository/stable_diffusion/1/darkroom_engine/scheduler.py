"""Who runs next. The scheduler orders samples and fills steps with them; it never sees a tensor."""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

from darkroom_engine.errors import InvalidRequest, Overloaded
from darkroom_engine.networks import Shape
from darkroom_engine.pace import Pace
from darkroom_engine.sample import Group, Sample

Order = Callable[[Sample], float]


class Work(NamedTuple):
    """What is left to do for samples."""

    seconds: float
    """At the present pace; 0 before there is one."""
    row_steps: float
    """Rows of all steps together."""


class Scheduler:
    """The samples in flight, by groups that share calls; each turn some of one make a step.

    *Between groups*, turns go round, so that none starves another.

    *Within a group*, every turn fills its rows afresh: one turn with those that came first, the
    next with those that have least left, and so on. By the first rule nobody is put off for ever;
    by the second a short sample does not wait for long ones, whose state simply waits. Where all
    are alike, or all fit, both choose the same, and nobody is interrupted. In both orders a level
    of priority is worth some seconds: of an earlier arrival, or of less that is left. Before both
    come those that would else miss the deadline with which they were taken in.

    Not thread-safe: the engine calls it under its own lock.
    """

    def __init__(
        self,
        max_rows: Callable[[Shape], int],
        max_queue_size: int,
        seconds_per_priority: float,
        pace: Pace,
    ) -> None:
        self._max_rows = max_rows
        self._max_queue_size = max_queue_size
        self._seconds_per_priority = seconds_per_priority
        self._pace = pace
        # Insertion order is the order of the turns: the group that ran is put back at the end.
        self._groups: dict[Group, list[Sample]] = {}
        self._last_orders: dict[Group, Order] = {}

    @property
    def num_waiting(self) -> int:
        """Samples that have not made their first step."""
        return sum(not sample.is_started for sample in self.samples())

    @property
    def num_running(self) -> int:
        return sum(sample.is_started for sample in self.samples())

    @property
    def work(self) -> Work:
        """What is left to do for all samples."""
        samples = self.samples()
        row_steps = sum(sample.num_row_steps for sample in samples)
        return Work(self._seconds_left(samples), row_steps)

    @property
    def has_work(self) -> bool:
        return any(not sample.job.is_held for sample in self.samples())

    def submit(self, samples: list[Sample]) -> None:
        """Take in all samples of a request, or none.

        Raises:
            Overloaded: too many wait already, or the request's deadline cannot be kept.
            InvalidRequest: there are more samples than may ever wait.
        """
        if len(samples) > self._max_queue_size:
            raise InvalidRequest(
                "num_images_per_prompt",
                f"{len(samples)} are more than may wait, allowed are 1 to {self._max_queue_size}",
            )
        # What was answered since the last turn is in nobody's way any more.
        self.retire()
        num_waiting = self.num_waiting
        if num_waiting + len(samples) > self._max_queue_size:
            raise Overloaded(
                f"the queue is full: {num_waiting} pictures are waiting, "
                f"{self._max_queue_size} may wait",
                self._seconds_until_room(num_waiting + len(samples) - self._max_queue_size),
            )
        self._check_deadline(samples)
        self._groups.setdefault(samples[0].group, []).extend(samples)

    def next_batch(self, now: float) -> list[Sample]:
        """The next samples of the group whose turn it is; empty if there are none.

        `now` is on the clock of `time.monotonic`, seconds.
        """
        able = {group: _able(samples) for group, samples in self._groups.items()}
        group = next((group for group, samples in able.items() if samples), None)
        if group is None:
            return []
        self._groups[group] = self._groups.pop(group)
        order = self._left if self._last_orders.get(group) == self._arrival else self._arrival
        self._last_orders[group] = order
        free = self._max_rows(group.shape)
        batch = []
        for sample in sorted(able[group], key=lambda s: (self._slack_s(s, now) > 0, order(s))):
            # One that does not fit leaves its place to a smaller one, for this step only: the next
            # turn of this order starts with it again.
            if sample.num_rows <= free:
                batch.append(sample)
                free -= sample.num_rows
        return batch

    def positions(self) -> dict[Sample, int]:
        """For each sample that has not started, how many such of its group came before it."""
        positions = {}
        for samples in self._groups.values():
            waiting = sorted((s for s in samples if not s.is_started), key=self._arrival)
            positions.update({sample: n for n, sample in enumerate(waiting)})
        return positions

    def retire(self) -> None:
        """Drop the samples whose request has been answered."""
        self._keep(lambda sample: not sample.job.is_over)

    def remove(self, samples: Iterable[Sample]) -> None:
        """Take out samples that are done or failed."""
        leaving = set(samples)
        self._keep(lambda sample: sample not in leaving)

    def samples(self) -> list[Sample]:
        """All samples, in no order that means anything."""
        return [sample for samples in self._groups.values() for sample in samples]

    def _keep(self, wanted: Callable[[Sample], bool]) -> None:
        groups = {group: [*filter(wanted, samples)] for group, samples in self._groups.items()}
        self._groups = {group: samples for group, samples in groups.items() if samples}
        self._last_orders = {g: o for g, o in self._last_orders.items() if g in self._groups}

    def _arrival(self, sample: Sample) -> float:
        """When it came, or would have come by its priority, on the clock of `time.monotonic`."""
        return sample.job.submitted_at - self._head_start(sample)

    def _left(self, sample: Sample) -> float:
        """Seconds of its own steps that are left, fewer by its priority."""
        step_s = self._pace.step_s(sample.latent_shape, sample.num_rows)
        return sample.num_steps_left * step_s - self._head_start(sample)

    def _slack_s(self, sample: Sample, now: float) -> float:
        """Seconds that it can spare to others if it then makes every second step."""
        deadline = sample.job.deadline
        if deadline is None:
            return math.inf
        shape = sample.latent_shape
        step_s = self._pace.step_s(shape, self._max_rows(shape))
        needed_s = 2 * sample.num_steps_left * step_s + self._pace.decode_s(shape)
        return deadline - now - needed_s

    def _head_start(self, sample: Sample) -> float:
        return sample.job.request.priority * self._seconds_per_priority

    def _check_deadline(self, samples: list[Sample]) -> None:
        """Refuse what would only run out of time among those before it, and cost them theirs."""
        timeout_ms = samples[0].job.request.timeout_ms
        if timeout_ms is None:
            return
        others = self.samples()
        # With nothing in its way, a request may try: the pace is an estimate.
        if not others:
            return
        # Whichever order lets it through first. Where not all fit, each has every second step, and
        # those between may go to others that have not even come yet.
        group = samples[0].group
        num_rows = sum(s.num_rows for s in (*samples, *others) if s.group == group)
        share = 1 if num_rows <= self._max_rows(group.shape) else 2
        needed_s = share * min(
            self._seconds_through(samples, others, order) for order in (self._arrival, self._left)
        )
        if 1000 * needed_s > timeout_ms:
            raise Overloaded(
                f"timeout_ms: {timeout_ms} cannot be kept, about {1000 * needed_s:.0f} ms of work "
                "are ahead",
                needed_s - timeout_ms / 1000,
            )

    def _seconds_through(self, samples: list[Sample], others: list[Sample], order: Order) -> float:
        """How long it takes to do `samples`, after those of the others that this order puts first.

        Those take rows of a turn, not turns: a long one leaves the other rows free.
        """
        own, group = order(samples[0]), samples[0].group
        shape = group.shape
        first = [o for o in others if o.group == group and order(o) <= own]
        num_own = sum(sample.num_row_steps for sample in samples)
        num_turns, enough = 0, samples[0].num_steps_left
        while num_turns < enough:
            num_turns = enough
            num_row_steps = num_own + sum(_row_steps_within(num_turns, o) for o in first)
            enough = math.ceil(num_row_steps / self._max_rows(shape))
        seconds = self._pace.steps_s(shape, num_turns, num_row_steps)
        # Other groups have their turns, whatever the order.
        for other_group in {o.group for o in others} - {group}:
            members = [o for o in others if o.group == other_group]
            max_row_steps = num_turns * self._max_rows(other_group.shape)
            row_steps = sum(_row_steps_within(num_turns, member) for member in members)
            turns = min(num_turns, max(member.num_steps_left for member in members))
            seconds += self._pace.steps_s(other_group.shape, turns, min(max_row_steps, row_steps))
        # Decoding goes on beside the steps, one after the other, and the last comes after them.
        decode_s = self._pace.decode_s(shape)
        num_before = len(first) + len(samples) - 1
        return max(seconds, num_before * decode_s) + decode_s

    def _seconds_until_room(self, num_places: int) -> float:
        """How long it takes, at the present pace, until that many pictures are done."""
        samples = self.samples()
        return num_places * self._seconds_left(samples) / max(1, len(samples))

    def _seconds_left(self, samples: list[Sample]) -> float:
        return sum(
            self._pace.steps_s(
                s.latent_shape, s.num_row_steps / self._max_rows(s.latent_shape), s.num_row_steps
            )
            for s in samples
        )


def _row_steps_within(num_turns: int, sample: Sample) -> float:
    """Rows that a sample takes in so many turns, on average over its steps."""
    left = sample.num_steps_left
    return sample.num_row_steps * min(1.0, num_turns / left) if left else 0.0


def _able(samples: list[Sample]) -> list[Sample]:
    """Those that could make a step now."""
    return [sample for sample in samples if not sample.job.is_held]
