"""`--trace-config` sends OpenTelemetry spans to a collector."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
from serving import WAIT_S, serving

from darkroom import Client
from darkroom.cli import main
from darkroom.server import ServeError, Server, free_ports

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
SPAN_ID = "00f067aa0ba902b7"


class Collector(ThreadingHTTPServer):
    """Takes OTLP over HTTP, in JSON, as Triton sends it."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), CollectorFace)
        self.spans: list[dict[str, Any]] = []
        self.services: set[str] = set()
        self.changed = threading.Condition()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1/traces"

    def take(self, export: dict[str, Any]) -> None:
        with self.changed:
            for resource in export["resourceSpans"]:
                self.services.add(attributes(resource["resource"])["service.name"])
                for scope in resource["scopeSpans"]:
                    self.spans += scope["spans"]
            self.changed.notify_all()

    def wait_for_spans(self, trace_id: str, count: int) -> list[dict[str, Any]]:
        def found() -> list[dict[str, Any]]:
            return [span for span in self.spans if span["traceId"] == trace_id]

        with self.changed:
            assert self.changed.wait_for(lambda: len(found()) >= count, WAIT_S), self.spans
            return found()


class CollectorFace(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        assert self.headers["Content-Type"] == "application/json"
        self.server.take(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def attributes(entry: dict[str, Any]) -> dict[str, str]:
    pairs = {pair["key"]: pair["value"] for pair in entry.get("attributes", [])}
    return {key: str(next(iter(value.values()))) for key, value in pairs.items()}


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as collector:
        thread = threading.Thread(target=collector.serve_forever, args=(0.02,))
        thread.start()
        yield collector
        collector.shutdown()
        thread.join()


def test_a_request_is_a_trace_that_continues_its_clients(
    repository: Path, collector: Collector
) -> None:
    settings = (
        *("mode=opentelemetry", "rate=1", "level=TIMESTAMPS"),
        *(f"opentelemetry,url={collector.url}", "opentelemetry,bsp_schedule_delay=100"),
    )
    options = [word for setting in settings for word in ("--trace-config", setting)]
    texts = {"prompt": "a red circle", "output_format": "b64_png"}
    body = {
        "id": "from-a-test",
        "inputs": [
            {"name": name, "datatype": "BYTES", "shape": [1], "data": [text]}
            for name, text in texts.items()
        ],
    }
    with serving(repository, *options) as served:
        request = Request(
            f"{served.http_url}/v2/models/stable_diffusion/infer",
            json.dumps(body).encode(),
            {"traceparent": f"00-{TRACE_ID}-{SPAN_ID}-01"},
        )
        with urlopen(request, timeout=WAIT_S) as answer:
            assert answer.status == 200
        spans = {span["name"]: span for span in collector.wait_for_spans(TRACE_ID, 3)}

    assert collector.services == {"triton-inference-server"}
    assert spans.keys() == {"InferRequest", "stable_diffusion", "compute"}
    assert spans["InferRequest"]["parentSpanId"] == SPAN_ID
    assert spans["stable_diffusion"]["parentSpanId"] == spans["InferRequest"]["spanId"]
    assert spans["compute"]["parentSpanId"] == spans["stable_diffusion"]["spanId"]
    told = attributes(spans["stable_diffusion"])
    assert told["triton.request_id"] == "from-a-test"
    assert told["triton.model_name"] == "stable_diffusion"


def test_a_collector_that_is_not_there_holds_nothing_up(repository: Path) -> None:
    settings = ("mode=opentelemetry", "rate=1", "level=TIMESTAMPS")
    url = "opentelemetry,url=http://127.0.0.1:1/v1/traces"
    with (
        Server(repository, free_ports(), trace_config=(*settings, url)) as server,
        Client(server.grpc_url, timeout=WAIT_S) as client,
    ):
        assert client.generate("a red circle", num_inference_steps=1).size


@pytest.mark.parametrize(
    "setting",
    ["opentelemetry", "url=http://127.0.0.1:1", "opentelemetry,uri=x", "rates=1", "rate="],
)
def test_a_trace_setting_that_triton_would_not_heed_is_refused(
    repository: Path, capsys: pytest.CaptureFixture[str], setting: str
) -> None:
    assert main(["serve", str(repository), "--trace-config", setting]) == 1
    err = capsys.readouterr().err
    assert f"darkroom: trace-config: {setting!r} is none of mode|level|rate|count=VALUE, " in err
    assert len(err.splitlines()) == 1


def test_a_trace_value_that_triton_refuses_is_told_in_its_words(repository: Path) -> None:
    with pytest.raises(ServeError, match="invalid value for trace level option: loud"):
        Server(repository, free_ports(), trace_config=["level=loud"]).start()
