"""The base install is a thin client: importing it brings numpy, Pillow and tritonclient alone."""

import json
import tomllib
from pathlib import Path

import pytest
from missing_packages import run_without

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"
EXTRAS = {
    *("torch", "diffusers", "transformers", "onnx", "onnxscript", "onnxruntime", "tokenizers"),
    *("pytriton", "safetensors", "huggingface_hub", "tqdm", "scipy", "gevent", "geventhttpclient"),
}

LIST_MODULES = """
import json
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""
GENERATE = """
from darkroom import AsyncClient, Client, DarkroomError
try:
    Client("127.0.0.1:1").generate("a cat", timeout=30)
except DarkroomError as error:
    print(type(error).__name__)
"""


@pytest.mark.parametrize("module", ["darkroom", "darkroom.cli", "darkroom.server"])
def test_importing_brings_no_framework(module: str) -> None:
    result = run_without(set(), f"import {module}\n{LIST_MODULES}")

    assert result.returncode == 0, result.stderr
    modules = set(json.loads(result.stdout))
    assert {"numpy", "PIL", "tritonclient"} <= modules
    assert modules.isdisjoint(EXTRAS)


def test_the_client_works_without_the_extras() -> None:
    result = run_without(EXTRAS, GENERATE)

    assert result.stdout == "ServerUnavailable\n", result.stderr


def test_importing_reads_nothing_and_says_nothing() -> None:
    code = """
opened = []
sys.addaudithook(lambda event, arguments: event == "socket.connect" and opened.append(arguments))
import darkroom
assert not opened, opened
"""
    result = run_without(set(), code)

    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_the_base_dependencies_are_three() -> None:
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    names = [requirement.partition(">")[0] for requirement in project["dependencies"]]

    assert names == ["tritonclient[grpc]", "numpy", "pillow"]
