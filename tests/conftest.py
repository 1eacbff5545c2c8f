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


# Before xdist looks for the groups.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Two groups that run side by side: what exports takes one core, and what serves, the other.

    All others are shared out between the two processes.
    """
    for item in items:
        folder = item.path.relative_to(Path(__file__).parent).parts[0]
        if folder in ("export", "server"):
            item.add_marker(pytest.mark.xdist_group(folder))


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Do not even import modules of tests that are all left out: PyTorch alone takes seconds."""
    if "not torch" not in config.option.markexpr or collection_path.suffix != ".py":
        return None
    return "pytestmark = pytest.mark.torch" in collection_path.read_text() or None
