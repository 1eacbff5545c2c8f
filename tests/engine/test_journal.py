"""A line of JSON for every request, with its id and without its prompt."""

import json
import logging
from typing import Any

import pytest
from engine_harness import Harness

from darkroom_engine import EngineError
from darkroom_engine.journal import JsonFormatter


def lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    text = [JsonFormatter("sdxl").format(record) for record in caplog.records]
    assert not any("\n" in line for line in text)
    return [line for line in map(json.loads, text) if line["message"] == "request"]


def ask(harness: Harness, request_id: str, **fields: Any) -> None:
    import threading

    is_answered = threading.Event()
    raw = {"prompt": b"a secret", "seed": 7, **fields}
    harness.engine.ask(raw, lambda _: is_answered.set(), request_id=request_id)
    assert is_answered.wait(30)
    # The line is written after the answer.
    harness.engine.close()


def test_a_picture_is_one_line(harness: Harness, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    ask(harness, "abc", num_inference_steps=3)

    (line,) = lines(caplog)
    assert (line["level"], line["request_id"], line["outcome"]) == ("info", "abc", "image")
    assert line["model"] == "sdxl"
    assert (line["seed"], line["num_inference_steps"], line["is_streamed"]) == (7, 3, False)
    assert line["total_ms"] >= line["queue_ms"] >= 0
    assert line["time"].endswith("+00:00")
    assert "secret" not in json.dumps(line)


def test_a_refusal_is_one_line(harness: Harness, caplog: pytest.LogCaptureFixture) -> None:
    ask(harness, "abc", width=1)

    (line,) = lines(caplog)
    assert (line["level"], line["request_id"], line["outcome"]) == ("warning", "abc", "invalid")
    assert line["error"].startswith("width: 1 is out of range")


def test_a_failure_is_one_line(harness: Harness, caplog: pytest.LogCaptureFixture) -> None:
    harness.networks.fail_always["unet"] = EngineError("broken")
    ask(harness, "abc")

    (line,) = lines(caplog)
    assert (line["outcome"], line["error"]) == ("error", "broken")


def test_a_traceback_stays_on_its_line() -> None:
    try:
        raise ValueError("two\nlines")
    except ValueError:
        import sys

        record = logging.LogRecord("a", logging.ERROR, "b", 1, "it", (), sys.exc_info())

    line = JsonFormatter("sdxl").format(record)
    assert "\n" not in line
    assert "two\nlines" in json.loads(line)["traceback"]
