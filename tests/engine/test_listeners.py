"""A listener hears of everything in order, and the engine does not wait for it."""

import io
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest
from engine_harness import WAIT_S, Harness
from PIL import Image

from darkroom_engine import Cancelled, EngineError, ImageRequest, Job, JobResult, Manifest
from darkroom_engine.arrays import HOST
from darkroom_engine.batch import Progress
from darkroom_engine.reporter import MAX_BACKLOG, MAX_PREVIEW_BACKLOG, Reporter
from darkroom_engine.sample import Group, Sample
from darkroom_engine.schedule import NoiseSchedule
from darkroom_engine.solver import initial_state
from darkroom_engine.unipc import UniPC


class Ear:
    """A listener that keeps what it hears."""

    def __init__(self, preview_interval: int = 0) -> None:
        self.preview_interval = preview_interval
        self.events: list[dict[str, Any]] = []
        self.previews: list[bytes] = []
        self.answer: Future[JobResult] = Future()
        self.gate = threading.Event()
        """While cleared, it listens to nothing."""
        self.gate.set()

    def on_event(self, event: dict[str, Any], preview: bytes | None) -> None:
        self.gate.wait()
        assert not self.answer.done()
        self.events.append(event)
        if preview is not None:
            self.previews.append(preview)

    def reply(self, answer: JobResult | EngineError) -> None:
        if isinstance(answer, JobResult):
            self.answer.set_result(answer)
        else:
            self.answer.set_exception(answer)

    def steps(self) -> list[tuple[int, int]]:
        return [(e["index"], e["step"]) for e in self.events if e["type"] == "step"]


def listen(harness: Harness, ear: Ear, prompt: str = "a cat", **fields: Any) -> Ear:
    request = ImageRequest.parse(
        {"prompt": prompt.encode(), "seed": 0, **fields}, harness.engine.limits
    )
    harness.engine.submit(request, ear.reply, listener=ear)
    return ear


def test_every_step_is_told_in_order_and_the_answer_comes_last(harness: Harness) -> None:
    ears = [listen(harness, Ear(), num_inference_steps=5 + n) for n in range(8)]

    for n, ear in enumerate(ears):
        ear.answer.result(WAIT_S)
        assert ear.events[0]["type"] == "queued"
        assert ear.steps() == [(0, step) for step in range(1, 6 + n)]
        assert ear.events[-1] == {"type": "step", "index": 0, "step": 5 + n, "num_steps": 5 + n}


def test_a_listened_picture_is_the_picture(harness: Harness) -> None:
    ear = listen(harness, Ear(preview_interval=2), num_inference_steps=7)

    assert ear.answer.result(WAIT_S).pictures == [harness.picture(num_inference_steps=7)]


def test_the_pictures_of_a_request_are_told_apart(harness: Harness) -> None:
    ear = listen(harness, Ear(), num_inference_steps=3, num_images_per_prompt=2)
    ear.answer.result(WAIT_S)

    assert sorted(ear.steps()) == [(i, step) for i in range(2) for step in (1, 2, 3)]


def test_previews_come_as_often_as_asked_but_not_for_the_last_step(harness: Harness) -> None:
    ear = listen(harness, Ear(preview_interval=3), num_inference_steps=9, width=64, height=32)
    ear.answer.result(WAIT_S)

    previewed = [event["step"] for event in ear.events if event["type"] == "preview"]
    assert previewed == [3, 6]
    for preview in ear.previews:
        with Image.open(io.BytesIO(preview)) as picture:
            assert (picture.format, picture.size) == ("JPEG", (8, 4))


def test_a_preview_is_the_linear_map_of_its_latents() -> None:
    from darkroom_engine.pictures import preview

    rng = np.random.default_rng(0)
    latents = np.repeat(np.repeat(rng.normal(size=(4, 2, 2)), 8, 1), 8, 2).astype(np.float32)
    matrix = rng.normal(size=(4, 3)).astype(np.float32) / 4
    bias = np.array([0.1, -0.1, 0.0], np.float32)

    with Image.open(io.BytesIO(preview(latents, matrix, bias))) as picture:
        seen = np.asarray(picture).astype(float)
    for row, column in ((4, 4), (4, 12), (12, 4), (12, 12)):
        unit = np.clip((latents[:, row, column] @ matrix + bias) / 2 + 0.5, 0, 1)
        assert np.abs(seen[row, column] - 255 * unit).max() < 40


def test_a_queued_request_hears_its_position_and_how_it_changes(
    make_engine: Callable[..., Harness],
) -> None:
    harness = make_engine(max_rows=2)
    harness.networks.gate.clear()
    ears = [listen(harness, Ear(), num_inference_steps=2) for _ in range(4)]
    harness.networks.gate.set()
    for ear in ears:
        ear.answer.result(WAIT_S)

    last = [event["position"] for event in ears[3].events if event["type"] == "queued"]
    assert last[0] in (2, 3)
    assert last == sorted(last, reverse=True)
    assert last[-1] == 0
    assert len(set(last)) == len(last)


def test_the_engine_does_not_wait_for_a_slow_listener(harness: Harness) -> None:
    ear = Ear(preview_interval=1)
    ear.gate.clear()
    listen(harness, ear, num_inference_steps=10)

    assert harness.picture(num_inference_steps=20)
    assert ear.events == []
    ear.gate.set()
    ear.answer.result(WAIT_S)
    assert len(ear.steps()) == 10


def test_what_a_listener_cannot_take_is_left_out_and_counted(
    manifest: Manifest, harness: Harness
) -> None:
    num_dropped = 0

    def drop(count: int) -> None:
        nonlocal num_dropped
        num_dropped += count

    reporter, ear = Reporter(manifest, HOST, drop), Ear(preview_interval=1)
    request = ImageRequest.parse({"prompt": b"", "num_inference_steps": 60}, harness.engine.limits)
    table = UniPC().table(NoiseSchedule.from_config(manifest.noise_schedule), 60)
    job = Job(request, ear.reply, listener=ear)
    sample = Sample(job, 0, table, Group("unet", (4, 4, 4)), request.guided_steps(60))
    sample.state = initial_state(np.zeros((4, 4, 4), np.float32), table)
    for _ in range(MAX_BACKLOG + 10):
        reporter.stepped([Progress(sample, 1, sample.state)])
    reporter.queued(ear, 7)
    answer = JobResult([b""], [0], {})
    reporter.answer(ear.reply, answer)
    reporter.start()

    # Where it stands in the queue, and the answer, are never left out.
    assert ear.answer.result(WAIT_S) == answer
    reporter.close()
    assert ear.events[-1] == {"type": "queued", "position": 7}
    num_steps = len(ear.steps())
    assert MAX_BACKLOG <= num_steps < MAX_BACKLOG + 10
    assert MAX_PREVIEW_BACKLOG <= len(ear.previews) < MAX_PREVIEW_BACKLOG + 2
    assert num_steps + len(ear.previews) + num_dropped == 2 * (MAX_BACKLOG + 10)


def test_a_listener_that_raises_harms_nobody(harness: Harness) -> None:
    class Deaf(Ear):
        def on_event(self, *_: Any) -> None:
            raise ConnectionError("the client is gone")

    deaf = listen(harness, Deaf(preview_interval=1), num_inference_steps=4)
    fine = listen(harness, Ear(), num_inference_steps=4)

    assert deaf.answer.result(WAIT_S).pictures
    assert fine.answer.result(WAIT_S).pictures
    assert len(fine.steps()) == 4


def test_an_error_is_the_last_that_is_told(harness: Harness) -> None:
    harness.picture()
    harness.networks.is_entered.clear()
    harness.networks.gate.clear()
    ear = Ear()
    request = ImageRequest.parse(
        {"prompt": b"a cat", "num_inference_steps": 50}, harness.engine.limits
    )
    job = harness.engine.submit(request, ear.reply, listener=ear)
    harness.networks.is_entered.wait(WAIT_S)
    job.cancel()
    with pytest.raises(Cancelled):
        ear.answer.result(WAIT_S)
    harness.networks.gate.set()
    harness.picture()

    # A step that was under way may still be told; the connection behind is closed by then.
    assert len(ear.steps()) <= 1
