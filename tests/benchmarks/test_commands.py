import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / script), *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True)


COMMANDS = [
    "perf.py",
    "batching.py",
    "decode.py",
    "overload.py",
    "fairness.py",
    "soak.py",
    "memory.py",
    "hop.py",
]


@pytest.mark.parametrize("script", COMMANDS)
def test_a_command_says_what_it_does_from_any_folder(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    result = run(script, "--help")

    assert result.returncode == 0
    assert "--output FILE" in result.stdout


@pytest.mark.parametrize("script", ["batching.py", "soak.py", "memory.py", "hop.py"])
def test_a_repository_that_does_not_exist_is_named(script, tmp_path):
    result = run(script, str(tmp_path))

    assert result.returncode == 1
    name = script.removesuffix(".py")
    assert f"{name}: {tmp_path / 'manifest.json'} is missing" in result.stderr


@pytest.mark.parametrize("script", ["decode.py", "overload.py", "fairness.py"])
def test_a_repository_that_cannot_be_copied_is_named(script, tmp_path):
    result = run(script, str(tmp_path / "nowhere"))

    assert result.returncode == 1
    assert f"{script.removesuffix('.py')}: " in result.stderr
    assert str(tmp_path / "nowhere") in result.stderr


@pytest.mark.parametrize("count", ["0", "-1", "some", "1.5"])
def test_a_count_that_is_none_is_refused(count):
    result = run("soak.py", f"--requests={count}")

    assert result.returncode == 2
    assert f"{count!r} is not a whole number above 0" in result.stderr


@pytest.mark.parametrize("concurrency", ["0", "1,,4", "four", "-1"])
def test_a_malformed_concurrency_is_refused(concurrency):
    result = run("perf.py", f"--concurrency={concurrency}")

    assert result.returncode == 2
    assert "whole numbers above 0" in result.stderr
