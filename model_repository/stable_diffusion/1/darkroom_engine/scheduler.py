"""Who runs next. The scheduler orders samples and fills steps with them; it never sees a tensor."""

from collections.abc import Callable, Iterable

from darkroom_engine.errors import Overloaded
from darkroom_engine.pace import Pace
from darkroom_engine.sample import Sample

Shape = tuple[int, int, int]

PATIENCE = 2.0
"""A sample is due when this many times its own length has passed since it arrived."""


class Scheduler:
    """The samples in flight, by latent shape; each turn one shape's most urgent ones make a step.

    *Between shapes*, turns go round, so that none starves another.

    *Within a shape*, every turn takes the samples afresh in the order in which they are due, as
    many as there are rows. A sample is due some multiple of its own remaining length after its
    arrival, and earlier by its priority: so a short one goes before a long one, whose state simply
    waits a few steps. Since that time does not move away while it waits (and comes nearer with
    every step it makes), only samples that arrive within a bounded time can overtake it: none
    starves, whatever its priority.

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
        self._groups: dict[Shape, list[Sample]] = {}

    @property
    def num_waiting(self) -> int:
        """Samples that have not made their first step."""
        return sum(not sample.is_started for sample in self.samples())

    @property
    def num_running(self) -> int:
        return sum(sample.is_started for sample in self.samples())

    @property
    def has_work(self) -> bool:
        return bool(self._groups)

    def submit(self, samples: list[Sample]) -> None:
        """Take in all samples of a request, or none.

        Raises:
            Overloaded: too many wait already, or the request's deadline cannot be kept.
        """
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
        self._groups.setdefault(samples[0].latent_shape, []).extend(samples)

    def next_batch(self) -> list[Sample]:
        """The most urgent samples of the shape whose turn it is; empty if there are none."""
        if not self._groups:
            return []
        shape = next(iter(self._groups))
        group = self._groups.pop(shape)
        group.sort(key=self._due)
        self._groups[shape] = group
        free = self._max_rows(shape)
        batch = []
        for sample in group:
            # One that does not fit leaves its place to a smaller one for this step only: at the
            # next it comes first again.
            if sample.num_rows <= free:
                batch.append(sample)
                free -= sample.num_rows
        return batch

    def positions(self) -> dict[Sample, int]:
        """How many of its shape will start before each sample that has not started, 0 for none."""
        positions = {}
        for group in self._groups.values():
            waiting = sorted((s for s in group if not s.is_started), key=self._due)
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
        return [sample for group in self._groups.values() for sample in group]

    def _keep(self, wanted: Callable[[Sample], bool]) -> None:
        groups = {shape: [*filter(wanted, group)] for shape, group in self._groups.items()}
        self._groups = {shape: group for shape, group in groups.items() if group}

    def _due(self, sample: Sample) -> float:
        """On the clock of `time.monotonic`, seconds."""
        job = sample.job
        head_start = job.request.priority * self._seconds_per_priority
        length = sample.num_steps_left * self._pace.step_s(sample.latent_shape, sample.num_rows)
        return job.submitted_at - head_start + PATIENCE * length

    def _check_deadline(self, samples: list[Sample]) -> None:
        """Refuse what would only run out of time among those before it, and cost them theirs."""
        timeout_ms = samples[0].job.request.timeout_ms
        if timeout_ms is None:
            return
        due = self._due(samples[0])
        ahead = [other for other in self.samples() if self._due(other) <= due]
        # With nothing in its way, a request may try: the pace is an estimate.
        if not ahead:
            return
        needed_s = self._pace.seconds_for([*ahead, *samples], self._max_rows)
        if 1000 * needed_s > timeout_ms:
            raise Overloaded(
                f"timeout_ms: {timeout_ms} cannot be kept, about {1000 * needed_s:.0f} ms of work "
                "are ahead",
                needed_s - timeout_ms / 1000,
            )

    def _seconds_until_room(self, num_places: int) -> float:
        samples = self.samples()
        per_picture = self._pace.seconds_for(samples, self._max_rows) / max(1, len(samples))
        return num_places * per_picture
