"""Streams through a real server: in the one running batch, in order, gone when their client is."""

import contextlib
import json
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from pixels import levels
from prometheus_client.parser import text_string_to_metric_families

from darkroom import (
    AsyncClient,
    Client,
    DarkroomError,
    Done,
    InvalidRequest,
    Picture,
    Preview,
    Queued,
    RequestCancelled,
    RequestTimeout,
    Step,
)
from darkroom.server import Server

WAIT_S = 120.0
SLOW: dict[str, Any] = {"width": 256, "height": 256, "guidance_scale": 1.0}
"""Of steps long enough to be counted, of one row."""


def requests(count: int) -> list[dict[str, Any]]:
    samplers = ("unipc", "euler_ancestral", "dpmpp_2m", "lcm", "ddim", "tcd", "dpmpp_2m_sde")
    return [
        {
            "prompt": f"a {('red', 'green', 'blue')[n % 3]} circle",
            "seed": n,
            "num_inference_steps": 4 + n % 9,
            "guidance_scale": (1.0, 5.0)[n % 2],
            "sampler": samplers[n % len(samplers)],
        }
        for n in range(count)
    ]


def metrics(server: Server) -> dict[str, float]:
    """Every sample of the one engine's metrics, by its name and its other label's value."""
    text = urllib.request.urlopen(server.metrics_url, timeout=WAIT_S).read().decode()
    return {
        " ".join([sample.name, *_labels_but_the_model(sample.labels)]): sample.value
        for family in text_string_to_metric_families(text)
        if family.name.startswith("darkroom")
        for sample in family.samples
    }


def _labels_but_the_model(labels: dict[str, str]) -> list[str]:
    return [value for name, value in labels.items() if name != "model"]


def settled_metrics(server: Server) -> dict[str, float]:
    """The metrics once they do not change any more: they are published a moment later."""
    before = metrics(server)
    while True:
        time.sleep(0.2)
        after = metrics(server)
        if after == before:
            return after
        before = after


def test_unary_and_streamed_requests_share_the_batch(server: Server, client: Client) -> None:
    asked = requests(32)
    alone = [client.generate(**fields) for fields in asked]
    before = settled_metrics(server)
    start = threading.Barrier(len(asked))

    def ask(n: int) -> tuple[list[Any], Picture]:
        start.wait()
        if n % 2:
            return [], client.generate(**asked[n])
        with client.stream(**asked[n], preview_interval=2) as stream:
            events = list(stream)
        return events, events[-1].pictures[0]

    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(ask, range(len(asked))))

    for n, (events, picture) in enumerate(answers):
        assert np.abs(levels(picture) - levels(alone[n])).max() <= 1, asked[n]
        if not events:
            continue
        num_steps = asked[n]["num_inference_steps"]
        assert isinstance(events[0], Queued)
        steps = [event.step for event in events if isinstance(event, Step)]
        assert steps == list(range(1, num_steps + 1))
        previews = [event.step for event in events if isinstance(event, Preview)]
        assert previews == list(range(2, num_steps, 2))
        assert [type(event) for event in events].count(Done) == 1
        order = [(e.step, isinstance(e, Preview)) for e in events if isinstance(e, Step | Preview)]
        assert order == sorted(order)

    after = settled_metrics(server)
    gained = {name: value - before.get(name, 0) for name, value in after.items()}
    assert gained["darkroom_requests_total image"] == 32
    assert gained["darkroom_images_total"] == 32
    picture_steps = sum(fields["num_inference_steps"] for fields in asked)
    assert gained["darkroom_batch_pictures_sum"] == picture_steps
    # Not one by one: on average many pictures share a step.
    assert gained["darkroom_batch_pictures_count"] < picture_steps / 4


def test_a_preview_shows_the_picture_small(client: Client) -> None:
    prompt = "a large red circle on a blue background"
    with client.stream(prompt, seed=1, num_inference_steps=12, preview_interval=11) as stream:
        events = list(stream)

    (preview,) = [event for event in events if isinstance(event, Preview)]
    (picture,) = events[-1].pictures
    assert preview.image.size == (picture.width // 8, picture.height // 8)
    small = levels(picture.resize(preview.image.size))
    assert np.abs(small - np.asarray(preview.image).astype(int)).mean() < 40


def test_over_http_the_same_events_come(server: Server, client: Client) -> None:
    request = {"prompt": "a red circle", "seed": 3, "num_inference_steps": 6}
    with Client(server.http_url) as http, http.stream(**request, preview_interval=3) as stream:
        events = list(stream)

    kinds = [type(event) for event in events]
    assert kinds == [Queued, Step, Step, Step, Preview, Step, Step, Step, Done]
    assert levels(events[-1].pictures[0]).tolist() == levels(client.generate(**request)).tolist()


def test_pictures_of_one_stream_are_told_apart(client: Client) -> None:
    with client.stream("a red circle", seed=5, num_images_per_prompt=2) as stream:
        *events, done = stream

    assert {event.index for event in events if isinstance(event, Step)} == {0, 1}
    assert [picture.seed for picture in done.pictures] == [5, 6]


@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_bad_input_is_named_on_a_stream(server: Server, scheme: str) -> None:
    url = server.grpc_url if scheme == "grpc" else server.http_url
    with Client(url) as client:
        for fields, message in (
            ({"width": 33}, "width: 33 is out of range|width: 33 is not a multiple"),
            ({"preview_interval": -1}, "preview_interval: -1 is out of range"),
            ({"sampler": "euler", "eta": 0.5}, "eta: only ddim and tcd take it"),
        ):
            with pytest.raises(InvalidRequest, match=message):
                list(client.stream("a red circle", **fields))


class Observer:
    """A long stream, whose steps count those that others make beside it."""

    def __init__(self, server: Server, client: Client) -> None:
        self._server = server
        self._before = settled_metrics(server)
        self.step = 0
        self._stream = client.stream("an observer", num_inference_steps=150, **SLOW)
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        self.wait_for_steps(2)

    def wait_for_steps(self, count: int) -> None:
        goal = self.step + count
        give_up_at = time.monotonic() + WAIT_S
        while self.step < goal:
            assert time.monotonic() < give_up_at
            time.sleep(0.005)

    def shared_steps(self) -> int:
        """How many steps anybody made with it; ends the stream."""
        self.wait_for_steps(8)
        self._stream.close()
        self._thread.join(WAIT_S)
        after = settled_metrics(self._server)
        name = "darkroom_step_duration_seconds_count 2"
        return int(after.get(name, 0) - self._before.get(name, 0))

    def _watch(self) -> None:
        with contextlib.suppress(RequestCancelled):
            for event in self._stream:
                if isinstance(event, Step):
                    self.step = event.step


Way = Callable[[Server, Client], Iterator[None]]


def cancel_unary_grpc(server: Server, _: Client) -> Iterator[None]:
    """As a task of asyncio that is cancelled."""
    import asyncio

    loop = asyncio.new_event_loop()

    async def ask() -> None:
        async with AsyncClient(server.grpc_url) as client:
            await client.generate("x", num_inference_steps=150, **SLOW)

    task = loop.create_task(ask())

    def run() -> None:
        with contextlib.suppress(asyncio.CancelledError):
            loop.run_until_complete(task)

    thread = threading.Thread(target=run)
    thread.start()
    yield
    loop.call_soon_threadsafe(task.cancel)
    thread.join(WAIT_S)
    loop.close()


def cancel_grpc_stream(_: Server, client: Client) -> Iterator[None]:
    stream = client.stream("x", num_inference_steps=150, **SLOW)
    next(stream)
    yield
    stream.close()


def leave_generate_stream(server: Server, _: Client) -> Iterator[None]:
    with Client(server.http_url) as http:
        stream = http.stream("x", num_inference_steps=150, **SLOW)
        next(stream)
        yield
        stream.close()


def cancel_plain_http_by_id(server: Server, client: Client) -> Iterator[None]:
    body = {"id": "by-id", "prompt": "x", "num_inference_steps": 150, "output_format": "b64_png"}
    url = f"{server.http_url}/v2/models/stable_diffusion/generate"

    def ask() -> None:
        request = urllib.request.Request(url, json.dumps(body | SLOW).encode())
        with contextlib.suppress(urllib.error.HTTPError):
            urllib.request.urlopen(request, timeout=WAIT_S).close()

    thread = threading.Thread(target=ask)
    thread.start()
    yield
    assert client.cancel("by-id")
    thread.join(WAIT_S)
    assert not client.cancel("by-id")


def kill_a_client(server: Server, _: Client) -> Iterator[None]:
    code = (
        "import sys; from darkroom import Client\n"
        "stream = Client(sys.argv[1]).stream('x', num_inference_steps=150, width=256, height=256,"
        " guidance_scale=1.0)\n"
        "for event in stream: print(event, flush=True)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, server.grpc_url], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline().startswith("Queued")
    yield
    process.kill()
    process.communicate()


def run_out_of_time(url: str) -> Iterator[None]:
    outcome: Future[Any] = Future()

    def ask() -> None:
        with Client(url) as client:
            try:
                client.generate("x", num_inference_steps=150, timeout=1.0, **SLOW)
            except DarkroomError as error:
                outcome.set_result(error)

    threading.Thread(target=ask).start()
    yield
    assert isinstance(outcome.result(WAIT_S), RequestTimeout)


def run_out_of_time_over_grpc(server: Server, _: Client) -> Iterator[None]:
    return run_out_of_time(server.grpc_url)


def run_out_of_time_over_http(server: Server, _: Client) -> Iterator[None]:
    return run_out_of_time(server.http_url)


TIMED = (run_out_of_time_over_grpc, run_out_of_time_over_http)
WAYS = (
    cancel_unary_grpc,
    cancel_grpc_stream,
    leave_generate_stream,
    cancel_plain_http_by_id,
    kill_a_client,
    *TIMED,
)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_who_leaves_frees_the_rows_within_two_steps(
    server: Server, client: Client, way: Way
) -> None:
    expected = client.generate("a red circle", seed=1, num_inference_steps=2)
    observer = Observer(server, client)
    arrived_at = observer.step
    leaving = way(server, client)
    next(leaving)
    observer.wait_for_steps(6)
    left_at = observer.step
    next(leaving, None)
    if way in TIMED:
        left_at = observer.step

    # The step that was under way when it left, and one more.
    shared = observer.shared_steps()
    assert 0 < shared <= left_at - arrived_at + 2
    assert client.generate("a red circle", seed=1, num_inference_steps=2).encoded == (
        expected.encoded
    )


def test_the_hundred_requests_after_a_killed_client_are_unaffected(
    server: Server, client: Client
) -> None:
    small = {"prompt": "a red circle", "width": 64, "height": 64, "num_inference_steps": 2}
    expected = client.generate(**small, seed=1)
    killing = kill_a_client(server, client)
    next(killing)
    next(killing, None)

    with ThreadPoolExecutor(8) as pool:
        pictures = list(pool.map(lambda _: client.generate(**small, seed=1), range(100)))

    assert all(np.abs(levels(p) - levels(expected)).max() <= 1 for p in pictures)


def test_a_stream_past_its_deadline_ends_with_an_error(client: Client) -> None:
    with pytest.raises(RequestTimeout, match="timeout_ms: 200 ran out"):
        list(client.stream("x", num_inference_steps=150, timeout_ms=200, **SLOW))


def test_a_clients_own_timeout_ends_its_stream(client: Client) -> None:
    with pytest.raises(RequestTimeout):
        list(client.stream("x", num_inference_steps=150, timeout=0.5, **SLOW))

    assert client.generate("a red circle", num_inference_steps=1).size


def test_a_reader_that_does_not_read_holds_up_nobody(client: Client) -> None:
    """It stops reading after its first event; the server buffers, and the others go on."""
    with client.stream("x", num_inference_steps=40, preview_interval=1) as idle:
        next(idle)
        assert client.generate("a red circle", num_inference_steps=20).size
        events = list(idle)

    assert [event.step for event in events if isinstance(event, Step)] == list(range(1, 41))
    assert isinstance(events[-1], Done)


def test_over_plain_http_a_deadline_and_a_cancel_are_what_they_are(
    server: Server, client: Client
) -> None:
    with Client(server.http_url) as http:
        with pytest.raises(RequestTimeout, match="timeout_ms: 200 ran out"):
            http.generate("x", num_inference_steps=150, timeout_ms=200, **SLOW)
        with ThreadPoolExecutor(1) as pool:
            fields = {"num_inference_steps": 150, "request_id": "plain"} | SLOW
            asked = pool.submit(http.generate, "x", **fields)
            while not client.cancel("plain"):
                assert not asked.done()
            with pytest.raises(RequestCancelled):
                asked.result(WAIT_S)


def test_an_id_that_is_unknown_or_not_unique_cancels_nothing(client: Client) -> None:
    assert not client.cancel("nobody")
    with (
        client.stream("x", num_inference_steps=20, request_id="twin") as one,
        client.stream("x", num_inference_steps=20, request_id="twin") as other,
    ):
        next(one), next(other)
        with pytest.raises(InvalidRequest, match="request_id: 'twin' names 2 requests"):
            client.cancel("twin")
        for stream in (one, other):
            *_, done = stream
            assert isinstance(done, Done)


def test_the_async_client_streams_too(server: Server) -> None:
    import asyncio

    async def ask(seed: int) -> list[Any]:
        async with AsyncClient(server.grpc_url) as client:
            return [
                event
                async for event in client.stream("a red circle", seed=seed, num_inference_steps=4)
            ]

    async def ask_all() -> list[list[Any]]:
        return await asyncio.gather(*(ask(seed) for seed in range(4)))

    for seed, events in enumerate(asyncio.run(ask_all())):
        assert [event.step for event in events if isinstance(event, Step)] == [1, 2, 3, 4]
        assert events[-1].pictures[0].seed == seed


SMALL: dict[str, Any] = {"width": 64, "height": 64, "num_inference_steps": 2}
SMALL_BUT_LONG = SMALL | {"num_inference_steps": 150}


def get_a_picture(client: Client, seed: int) -> None:
    client.generate("a red circle", seed=seed, **SMALL)


def stream_a_picture(client: Client, seed: int) -> None:
    list(client.stream("a red circle", seed=seed, preview_interval=1, **SMALL))


def ask_nonsense(client: Client, seed: int) -> None:
    client.generate("a red circle", seed=seed, **SMALL | {"width": 65})


def close_a_stream(client: Client, seed: int) -> None:
    with client.stream("a red circle", seed=seed, **SMALL_BUT_LONG) as stream:
        next(stream)
    raise RequestCancelled


def cancel_a_stream(client: Client, seed: int) -> None:
    request_id = f"storm-{seed}"
    with client.stream("a red circle", seed=seed, request_id=request_id, **SMALL_BUT_LONG) as it:
        next(it)
        assert client.cancel(request_id)
        list(it)


STORM = (
    (get_a_picture, None),
    (stream_a_picture, None),
    (ask_nonsense, InvalidRequest),
    (close_a_stream, RequestCancelled),
    (cancel_a_stream, RequestCancelled),
)


def test_a_storm_of_all_kinds_is_answered_once_each(server: Server, client: Client) -> None:
    before = settled_metrics(server)

    def ask(n: int) -> type[DarkroomError] | None:
        try:
            STORM[n % len(STORM)][0](client, n)
        except DarkroomError as error:
            return type(error)
        return None

    with ThreadPoolExecutor(12) as pool:
        outcomes = list(pool.map(ask, range(200)))

    assert outcomes == [outcome for _, outcome in STORM] * 40
    after = settled_metrics(server)
    for outcome, count in (("image", 80), ("invalid", 40), ("cancelled", 80)):
        name = f"darkroom_requests_total {outcome}"
        assert after[name] - before.get(name, 0) == count
    assert after["darkroom_waiting_pictures"] == after["darkroom_running_pictures"] == 0
