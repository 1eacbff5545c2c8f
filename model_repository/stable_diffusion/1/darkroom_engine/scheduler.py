"""Who runs next. The scheduler moves samples from waiting to running; it never sees a tensor."""

import bisect
from collections.abc import Callable, Iterable

from darkroom_engine.errors import DeadlineExceeded, EngineError, Overloaded
from darkroom_engine.job import Job
from darkroom_engine.sample import Sample

Shape = tuple[int, int, int]


class Scheduler:
    """Waiting samples in order of priority and arrival, running ones grouped by latent shape.

    Samples of one shape share a UNet call of at most `max_rows` rows. Shapes take turns, so none
    can starve another; a sample waits only for rows of its own shape. Not thread-safe: the engine
    calls it under its own lock.
    """

    def __init__(self, max_rows: int, max_queue_size: int) -> None:
        self._max_rows = max_rows
        self._max_queue_size = max_queue_size
        self._waiting: list[Sample] = []
        # Insertion order is the order of the turns: the group that ran is put back at the end.
        self._running: dict[Shape, list[Sample]] = {}

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return sum(map(len, self._running.values()))

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._running)

    def submit(self, samples: list[Sample]) -> None:
        """Queue all samples of a request, or none.

        Raises:
            Overloaded: the queue has no room for all of them.
        """
        if self.num_waiting + len(samples) > self._max_queue_size:
            raise Overloaded(
                f"the queue is full: {self.num_waiting} pictures are waiting, "
                f"{self._max_queue_size} may wait; try again later"
            )
        for sample in samples:
            bisect.insort_right(self._waiting, sample, key=_urgency)

    def retire(self, now: float) -> list[tuple[Job, EngineError]]:
        """Drop samples whose job is over, and those past their deadline.

        Returns:
            The jobs that expired, with the error that each is owed.
        """
        expired: list[tuple[Job, EngineError]] = [
            (sample.job, DeadlineExceeded(f"timeout_ms: {sample.job.request.timeout_ms} ran out"))
            for sample in self.samples()
            if not sample.job.is_over and _is_expired(sample.job, now)
        ]
        self._keep(lambda sample: not sample.job.is_over and not _is_expired(sample.job, now))
        return expired

    def admit(self) -> list[Sample]:
        """Start waiting samples while their shape has rows free; returns those that started."""
        admitted: list[Sample] = []
        still_waiting: list[Sample] = []
        full: set[Shape] = set()
        for sample in self._waiting:
            shape = sample.latent_shape
            group = self._running.get(shape, [])
            rows = sum(member.num_rows for member in group)
            if shape in full or rows + sample.num_rows > self._max_rows:
                # Nobody of this shape overtakes, else a large request could wait for ever.
                full.add(shape)
                still_waiting.append(sample)
                continue
            self._running.setdefault(shape, group).append(sample)
            admitted.append(sample)
        self._waiting = still_waiting
        return admitted

    def next_batch(self) -> list[Sample]:
        """The samples of the shape whose turn it is; empty if nothing runs."""
        if not self._running:
            return []
        shape = next(iter(self._running))
        group = self._running.pop(shape)
        self._running[shape] = group
        return list(group)

    def remove(self, samples: Iterable[Sample]) -> None:
        """Take out samples that are done or failed."""
        leaving = set(samples)
        self._keep(lambda sample: sample not in leaving)

    def samples(self) -> list[Sample]:
        """All samples, waiting and running."""
        return [*self._waiting, *(sample for group in self._running.values() for sample in group)]

    def _keep(self, wanted: Callable[[Sample], bool]) -> None:
        self._waiting = [sample for sample in self._waiting if wanted(sample)]
        groups = {shape: [*filter(wanted, group)] for shape, group in self._running.items()}
        self._running = {shape: group for shape, group in groups.items() if group}


def _urgency(sample: Sample) -> int:
    return -sample.job.request.priority


def _is_expired(job: Job, now: float) -> bool:
    return job.deadline is not None and now >= job.deadline
