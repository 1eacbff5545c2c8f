"""Loading and unloading over Triton's HTTP API, with a server that speaks it."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from darkroom.ports import free_ports
from darkroom_engine.errors import NetworkFailed
from darkroom_engine.model_control import TritonModelControl


class FakeTriton(ThreadingHTTPServer):
    """The model repository extension of Triton's HTTP API, as far as it is used."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: list[str] = []
        self.states: dict[str, list[str | None]] = {}
        """What is said of a model's state, time after time; the last for ever."""
        self.answers: dict[str, tuple[int, bytes]] = {}
        """By path, where it is not success."""
        self.talks_nonsense = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def index(self) -> list[dict[str, str]]:
        entries = []
        for name, states in self.states.items():
            state = states.pop(0) if len(states) > 1 else states[0]
            entries.append({"name": name, **({"state": state} if state else {})})
        return entries


class _Handler(BaseHTTPRequestHandler):
    server: FakeTriton

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append(self.path)
        if self.server.talks_nonsense:
            self.wfile.write(b"what?\r\n")
            return
        if self.path == "/v2/repository/index":
            default = (200, json.dumps(self.server.index()).encode())
        else:
            default = (200, b"")
        status, body = self.server.answers.get(self.path, default)
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def triton() -> Iterator[FakeTriton]:
    with FakeTriton() as triton:
        thread = threading.Thread(target=triton.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield triton
        triton.shutdown()
        thread.join()


@pytest.fixture
def control(triton: FakeTriton) -> TritonModelControl:
    return TritonModelControl(triton.url)


def test_a_network_is_loaded_by_its_name(triton: FakeTriton) -> None:
    TritonModelControl(triton.url, "xl_").load("unet")

    assert triton.asked == ["/v2/repository/models/xl_unet/load"]


def test_an_unload_is_over_when_triton_has_ended_the_process(
    triton: FakeTriton, control: TritonModelControl
) -> None:
    triton.states = {"other": ["READY"], "unet": ["READY", "UNLOADING", "UNLOADING", "UNAVAILABLE"]}
    control.unload("unet")

    assert triton.asked == ["/v2/repository/models/unet/unload"] + ["/v2/repository/index"] * 4


@pytest.mark.parametrize("states", [{}, {"unet": [None]}, {"unet": ["UNAVAILABLE"]}])
def test_what_is_not_loaded_is_unloaded_at_once(
    triton: FakeTriton, control: TritonModelControl, states: dict[str, list[str | None]]
) -> None:
    triton.states = states
    control.unload("unet")

    assert triton.asked.count("/v2/repository/index") == 1


def test_what_never_leaves_is_told(triton: FakeTriton) -> None:
    control = TritonModelControl(triton.url, unload_timeout_s=0.05)
    triton.states = {"unet": ["UNLOADING"]}

    with pytest.raises(NetworkFailed, match=r"unet failed: cannot be unloaded within 0.05 s"):
        control.unload("unet")


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (b'{"error": "load failed: no such file\\n\\nAt:\\n  x.py"}', "load failed: no such file"),
        (b"<html>Bad\ngateway", "<html>Bad"),
        (b"[]", r"\[\]"),
    ],
)
def test_a_refusal_is_told_in_a_line(
    triton: FakeTriton, control: TritonModelControl, body: bytes, problem: str
) -> None:
    triton.answers["/v2/repository/models/unet/load"] = (400, body)

    with pytest.raises(NetworkFailed, match=f"unet failed: cannot be loaded: {problem}$") as raised:
        control.load("unet")
    assert not raised.value.is_final


def test_a_server_that_has_stopped_is_not_waited_for() -> None:
    control = TritonModelControl(f"http://127.0.0.1:{free_ports().http}")

    with pytest.raises(NetworkFailed, match=r"cannot be loaded: .*Connection refused") as raised:
        control.load("unet")
    assert raised.value.is_final


def test_a_server_that_talks_nonsense_is_told(
    triton: FakeTriton, control: TritonModelControl
) -> None:
    triton.talks_nonsense = True

    with pytest.raises(NetworkFailed, match="cannot be loaded: BadStatusLine"):
        control.load("unet")
