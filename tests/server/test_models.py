"""Several models in one server: each answers for itself, and one model tells of all."""

import json
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
from serving import WAIT_S, Serving, serving, wait_until
from tritonclient.utils import InferenceServerException

from darkroom import Client, RequestCancelled
from darkroom.cli import main
from darkroom.server import Server

NAMES = ("stable_diffusion", "second")
REQUEST: dict[str, Any] = {"prompt": "a red circle", "seed": 7, "num_inference_steps": 6}
LONG: dict[str, Any] = {"num_inference_steps": 150, "width": 256, "height": 256}


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("log") / "server.log"


@pytest.fixture(scope="module")
def both(repository: Path, log: Path) -> Iterator[Serving]:
    """One repository under two names, one of which it has by itself."""
    options = ("--max-rows", "4", "--log-file", str(log))
    with serving(repository, f"second={repository}", *options) as served:
        yield served


@pytest.fixture(params=NAMES)
def client(both: Serving, request: pytest.FixtureRequest) -> Iterator[Client]:
    with Client(both.grpc_url, model=request.param, timeout=WAIT_S) as client:
        yield client


def metrics(served: Serving) -> dict[str, float]:
    """The values of all series of ours, by name and labels."""
    url = f"http://127.0.0.1:{served.ports.metrics}/metrics"
    text = urllib.request.urlopen(url, timeout=WAIT_S).read().decode()
    lines = re.findall(r"^(darkroom_\S+) (\S+)$", text, re.MULTILINE)
    return {series: float(value) for series, value in lines}


def num_pictures(served: Serving, model: str) -> float:
    return metrics(served).get(f'darkroom_images_total{{model="{model}"}}', 0.0)


def ask_http(served: Serving, endpoint: str, body: object) -> tuple[int, dict[str, Any]]:
    url = f"{served.http_url}/v2/models/darkroom/{endpoint}"
    try:
        with urllib.request.urlopen(
            urllib.request.Request(url, json.dumps(body).encode()), timeout=WAIT_S
        ) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def ask_grpc(served: Serving, *names: bytes) -> list[dict[str, Any]]:
    tensor = tritonclient.grpc.InferInput("model", [len(names)], "BYTES")
    tensor.set_data_from_numpy(np.array(names, np.object_))
    with tritonclient.grpc.InferenceServerClient(served.grpc_url) as triton:
        result = triton.infer("darkroom", [tensor] if names else [])
    return json.loads(result.as_numpy("models")[0])


def test_each_makes_the_picture_that_it_makes_alone(server: Server, client: Client) -> None:
    with Client(server.grpc_url, timeout=WAIT_S) as alone:
        expected = alone.generate(**REQUEST)

    assert client.generate(**REQUEST).encoded == expected.encoded
    *_, done = client.stream(**REQUEST)
    assert done.pictures[0].encoded == expected.encoded


def test_a_cancel_goes_to_the_model_that_has_the_request(both: Serving) -> None:
    with (
        Client(both.grpc_url, model="second", timeout=WAIT_S) as second,
        Client(both.grpc_url, timeout=WAIT_S) as first,
        second.stream("a red circle", request_id="one", **LONG) as events,
    ):
        next(events)
        assert not first.cancel("one")
        assert second.cancel("one")
        with pytest.raises(RequestCancelled):
            list(events)


def test_metrics_tell_the_models_apart(both: Serving) -> None:
    before = {name: num_pictures(both, name) for name in NAMES}
    with Client(both.grpc_url, model="second", timeout=WAIT_S) as second:
        # A probe may come between.
        for _ in range(20):
            second.generate("a red circle", num_inference_steps=1)
    wait_until(lambda: num_pictures(both, "second") >= before["second"] + 20)

    assert num_pictures(both, "stable_diffusion") < before["stable_diffusion"] + 20
    for name in NAMES:
        assert metrics(both)[f'darkroom_max_rows{{model="{name}"}}'] == 4
        assert metrics(both)[f'darkroom_requests_total{{model="{name}",outcome="image"}}'] > 0


def test_a_server_tells_of_all_its_models(both: Serving, repository: Path) -> None:
    manifest = json.loads((repository / "manifest.json").read_text())
    models = ask_grpc(both)

    assert [model["model"] for model in models] == ["second", "stable_diffusion"]
    for model in models:
        assert (model["name"], model["family"]) == (manifest["name"], manifest["family"])
        assert model["limits"]["max_size"] == manifest["limits"]["max_size"]
    texts = [
        ask_http(both, "generate", {})[1]["models"],
        ask_http(both, "infer", {"inputs": []})[1]["outputs"][0]["data"][0],
    ]
    assert [json.loads(text) for text in texts] == [models, models]


def test_a_server_tells_of_one_model(both: Serving) -> None:
    (second,) = ask_grpc(both, b"second")

    assert second["model"] == "second"
    status, answer = ask_http(both, "generate", {"model": "second"})
    assert (status, json.loads(answer["models"])) == (200, [second])


def test_an_unknown_model_is_refused_with_those_that_there_are(both: Serving) -> None:
    problem = "model: 'third' does not exist, there are second, stable_diffusion"

    with pytest.raises(InferenceServerException, match=problem) as caught:
        ask_grpc(both, b"third")
    assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"
    assert ask_http(both, "generate", {"model": "third"}) == (400, {"error": problem})


def test_the_probe_command_asks_the_model_that_it_is_told(
    both: Serving, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["probe", "--url", both.grpc_url, "--model", "second"]) == 0
    assert main(["probe", "--url", both.grpc_url, "--model", "third"]) == 1
    assert "third" in capsys.readouterr().err


@pytest.mark.usefixtures("both")
def test_the_log_tells_the_models_apart(log: Path) -> None:
    def models() -> set[str]:
        lines = [line for line in log.read_text().splitlines() if line.startswith('{"time"')]
        return {line["model"] for line in map(json.loads, lines) if line["message"] == "request"}

    wait_until(lambda: models() == set(NAMES))


def test_a_network_of_one_and_the_publisher_die_and_are_healed(both: Serving) -> None:
    with Client(both.grpc_url, model="second", timeout=WAIT_S) as second:
        before = both.processes()
        for times, name in enumerate(("second_unet", "darkroom"), 1):
            both.kill(name)
            both.wait_until_told(f"^{name} died; reloading it$")
            assert second.generate(**REQUEST).size
            both.wait_until_told("^healed in", times)
        after = both.processes()
        assert after.keys() == before.keys()
        changed = {name for name in after if after[name] != before[name]}
        assert changed == {"second_unet", "darkroom"}

        # Whoever publishes now hears of what comes now.
        counted = num_pictures(both, "second")
        second.generate(**REQUEST)
        wait_until(lambda: num_pictures(both, "second") > counted)
    assert [model["model"] for model in ask_grpc(both)] == ["second", "stable_diffusion"]


def test_any_dead_engine_restarts_the_server(both: Serving) -> None:
    """This is the last one, since it takes the server with it."""
    times = sum(line.startswith("healed") for line in both.told)
    both.kill("second")
    both.wait_until_told("^second died; restarting the server$")
    both.wait_until_told("^healed in", times + 1)

    for name in NAMES:
        with Client(both.grpc_url, model=name, timeout=WAIT_S) as client:
            assert client.generate(**REQUEST).size


def test_two_models_of_one_name_are_refused_in_one_line(
    repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", f"a={repository}", f"a={repository}"]) == 1
    err = capsys.readouterr().err
    assert "its model 'a' would be called as one of" in err
    assert len(err.splitlines()) == 1
