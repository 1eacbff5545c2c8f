"""Shared by all tests."""

import platform
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

REPORTED = ("numpy", "torch", "diffusers", "transformers", "onnxruntime", "tritonclient")


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A folder for sockets, whose paths must be shorter than those of `tmp_path` may be."""
    with tempfile.TemporaryDirectory(prefix="dr-") as folder:
        yield Path(folder)


def pytest_report_header() -> str:
    versions = [f"python {platform.python_version()}"]
    for package in REPORTED:
        try:
            versions.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            versions.append(f"no {package}")
    return ", ".join(versions)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Do not even import modules of tests that are all left out: PyTorch alone takes seconds."""
    if "not torch" not in config.option.markexpr or collection_path.suffix != ".py":
        return None
    return "pytestmark = pytest.mark.torch" in collection_path.read_text() or None
