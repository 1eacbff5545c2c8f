"""What an engine says of itself beside its socket."""

import json
import logging
from pathlib import Path

import pytest

import darkroom_wire as wire
from darkroom_engine import Notice


@pytest.fixture(autouse=True)
def runtime_dir(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(wire.RUNTIME_DIR, str(short_path / "runtime"))
    wire.make_runtime_dir()
    return short_path / "runtime"


def test_it_is_there_from_post_to_remove_and_nothing_else_is(runtime_dir: Path) -> None:
    notice = Notice("sdxl")
    assert wire.description_paths() == {}
    notice.post({"family": "sdxl", "modes": ("text2img",)})

    (path,) = runtime_dir.iterdir()
    assert wire.description_paths() == {"sdxl": path}
    assert json.loads(path.read_text()) == {"family": "sdxl", "modes": ["text2img"]}
    notice.remove()
    assert list(runtime_dir.iterdir()) == []


def test_a_name_may_have_dots() -> None:
    Notice("sd-1.5.json").post({})

    assert set(wire.description_paths()) == {"sd-1.5.json"}


def test_an_older_engine_leaves_the_newer_ones_alone() -> None:
    older, newer = Notice("sdxl"), Notice("sdxl")
    older.post({"engine": "older"})
    newer.post({"engine": "newer"})
    older.remove()

    assert json.loads(wire.description_path("sdxl").read_text()) == {"engine": "newer"}


def test_what_was_never_posted_is_removed_in_peace() -> None:
    Notice("sdxl").remove()


def test_an_engine_that_cannot_post_goes_on(
    runtime_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    runtime_dir.rmdir()
    with caplog.at_level(logging.ERROR):
        Notice("sdxl").post({})

    assert "cannot be told" in caplog.text
