"""A small server under load: who is refused, who goes first, and that nobody is forgotten."""

import json
import re
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from serving import wait_until

from darkroom import Client, Picture, Queued, QueueFull, RequestTimeout, Step
from darkroom.server import Server, free_ports

WAIT_S = 120.0
LONG: dict[str, Any] = {
    "num_inference_steps": 150,
    "width": 256,
    "height": 256,
    "guidance_scale": 1.0,
}
SHORT = LONG | {"num_inference_steps": 4}


def serve(repository: Path, copy: Path, **parameters: str) -> Server:
    """A server whose engine has other parameters than those that are shipped."""
    shutil.copytree(repository, copy)
    config = copy / "stable_diffusion" / "config.pbtxt"
    text = config.read_text()
    for key, value in parameters.items():
        text, count = re.subn(
            rf'(key: "{key}" value {{ string_value: )"\w+"', rf'\1"{value}"', text
        )
        assert count == 1
    config.write_text(text)
    return Server(copy, free_ports())


@pytest.fixture(scope="module")
def small(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    copy = tmp_path_factory.mktemp("small") / "repository"
    with serve(repository, copy, max_rows="2", max_queue_size="3", warmup_rows="2") as server:
        yield server


@pytest.fixture
def client(small: Server) -> Iterator[Client]:
    with Client(small.grpc_url, timeout=WAIT_S) as client:
        yield client


class Crowd:
    """Requests on their way, in threads of their own; those left at the end are cancelled."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._pool = ThreadPoolExecutor(16)
        self._ids: list[str] = []
        self.order: list[str] = []
        """The names of the requests that were answered, as they were."""

    def start(self, name: str, **fields: Any) -> "Future[Picture]":
        """Send a request and return when it has made its first step."""
        return self.ask(name, Step, **fields)

    def ask(self, name: str, until: type = Queued, **fields: Any) -> "Future[Picture]":
        """Send a request and return when the server has it."""
        request_id = f"crowd-{time.monotonic_ns()}"
        stream = self._client.stream(name, request_id=request_id, **fields)
        while not isinstance(next(stream), until):
            pass
        self._ids.append(request_id)

        def finish() -> Picture:
            *_, done = stream
            self.order.append(name)
            return done.pictures[0]

        return self._pool.submit(finish)

    def leave(self) -> None:
        for request_id in self._ids:
            self._client.cancel(request_id)
        self._pool.shutdown()


@pytest.fixture
def crowd(client: Client) -> Iterator[Crowd]:
    crowd = Crowd(client)
    yield crowd
    crowd.leave()


def fill(crowd: Crowd) -> None:
    """Two that run and three that wait."""
    for n in range(2):
        crowd.start(f"long {n}", **LONG)
    for n in range(2, 5):
        crowd.ask(f"long {n}", **LONG)


def test_a_full_queue_refuses_with_a_hint_over_grpc_and_http(
    small: Server, client: Client, crowd: Crowd
) -> None:
    fill(crowd)

    with pytest.raises(QueueFull, match="the queue is full: 3 pictures are waiting, 3 may") as it:
        client.generate("one too many", **LONG)
    assert it.value.is_retryable
    assert it.value.retry_after_s is not None
    assert it.value.retry_after_s > 0
    with Client(small.http_url) as http, pytest.raises(QueueFull) as it:
        http.generate("one too many", **LONG)
    assert it.value.retry_after_s is not None
    with pytest.raises(QueueFull):
        list(client.stream("one too many", **LONG))

    tensor = {"name": "prompt", "shape": [1], "datatype": "BYTES", "data": ["one too many"]}
    # Triton's generate endpoint makes 400 of all errors of a model.
    for endpoint, body, status in (
        ("infer", {"inputs": [tensor]}, 503),
        ("generate", {"prompt": "one too many"}, 400),
    ):
        code, text = post(f"{small.http_url}/v2/models/stable_diffusion/{endpoint}", body)
        assert code == status
        assert "the queue is full" in text
        assert "retry_after_ms: " in text


def post(url: str, body: dict[str, Any]) -> tuple[int, str]:
    request = urllib.request.Request(url, json.dumps(body).encode())
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=WAIT_S)
    with caught.value as error:
        return error.code, error.read().decode()


def test_a_deadline_that_cannot_be_kept_is_refused_with_a_hint(
    client: Client, crowd: Crowd
) -> None:
    crowd.start("long", **LONG)
    crowd.ask("long", **LONG)

    with pytest.raises(QueueFull, match=r"timeout_ms: 50 cannot be kept, about \d+ ms") as it:
        client.generate("too late", **LONG, timeout_ms=50)
    assert it.value.retry_after_s is not None


def test_what_runs_out_of_time_ends_and_makes_room(client: Client, crowd: Crowd) -> None:
    expiring = crowd.start("expiring", **LONG, timeout_ms=1500)
    with pytest.raises(RequestTimeout, match="timeout_ms: 1500 ran out"):
        expiring.result(WAIT_S)

    assert client.generate("next", **SHORT).queue_steps <= 2


def test_a_short_request_goes_before_the_long_ones_that_run(client: Client, crowd: Crowd) -> None:
    long = [crowd.start(f"long {n}", **LONG) for n in range(2)]
    long.append(crowd.ask("long 2", **LONG))
    waits = [client.generate("short", **SHORT, seed=n).queue_steps for n in range(5)]

    assert max(waits) <= 2
    assert not any(future.done() for future in long)


def test_a_high_priority_overtakes_and_a_low_one_still_ends(crowd: Crowd) -> None:
    fields = LONG | {"num_inference_steps": 20}
    running = [crowd.start("running", **fields) for _ in range(2)]
    low = crowd.ask("low", **fields, priority=-5)
    middle = crowd.ask("middle", **fields)
    high = crowd.ask("high", **fields, priority=5)

    for future in (*running, low, middle, high):
        assert future.result(WAIT_S).size == (256, 256)
    assert crowd.order.index("high") < crowd.order.index("middle") < crowd.order.index("low")
    assert crowd.order[-1] == "low"


def test_a_picture_that_made_room_is_the_same(client: Client, crowd: Crowd) -> None:
    fields = LONG | {"num_inference_steps": 30, "sampler": "euler_ancestral", "seed": 9}
    alone = client.generate("long", **fields)
    long = [crowd.ask("long", **fields) for _ in range(2)]
    for seed in range(4):
        client.generate("short", **SHORT, seed=seed)

    for future in long:
        assert future.result(WAIT_S).encoded == alone.encoded


def test_an_engine_finds_the_rows_that_fit_by_itself(repository: Path, tmp_path: Path) -> None:
    with serve(repository, tmp_path / "copy", max_rows="auto") as server:

        def is_told() -> bool:
            text = urllib.request.urlopen(server.metrics_url, timeout=WAIT_S).read().decode()
            told = r'^darkroom_max_rows{model="stable_diffusion"} ([3-9]|\d\d)$'
            return re.search(told, text, re.MULTILINE) is not None

        # Metrics come a moment after what they tell of.
        wait_until(is_told)
        log = server.log.read_text()

    assert re.search(r"max_rows is \d+: a row takes \d+ MB, \d+ MB are free", log)
