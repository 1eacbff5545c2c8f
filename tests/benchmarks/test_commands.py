import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / script), *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True)


@pytest.mark.parametrize("script", ["perf.py", "batching.py"])
def test_a_command_says_what_it_does_from_any_folder(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    result = run(script, "--help")

    assert result.returncode == 0
    assert "--output FILE" in result.stdout


def test_a_repository_that_does_not_exist_is_named(tmp_path):
    result = run("batching.py", str(tmp_path))

    assert result.returncode == 1
    assert f"batching: {tmp_path / 'manifest.json'} is missing" in result.stderr


@pytest.mark.parametrize("concurrency", ["0", "1,,4", "four", "-1"])
def test_a_malformed_concurrency_is_refused(concurrency):
    result = run("perf.py", f"--concurrency={concurrency}")

    assert result.returncode == 2
    assert "whole numbers above 0" in result.stderr
