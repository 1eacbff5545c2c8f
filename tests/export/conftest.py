"""Tiny checkpoints of the real classes; one exported in each precision and as a single file."""

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

collect_ignore_glob = [] if importlib.util.find_spec("torch") else ["test_*.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.torch)


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of an architecture with random weights, made when it is first asked for."""
    from darkroom_export.random_checkpoint import make_random_checkpoint

    root = tmp_path_factory.mktemp("checkpoints")

    def make_checkpoint(architecture: str) -> Path:
        folder = root / architecture
        if not folder.exists():
            make_random_checkpoint(architecture, folder)
        return folder

    return make_checkpoint


@pytest.fixture(scope="session")
def checkpoint(make_checkpoint: Callable[[str], Path]) -> Path:
    return make_checkpoint("tiny-sd15")


@pytest.fixture(scope="session")
def workshop() -> Any:
    """Exports of every family, which `make equivalence` uses too: made once for each checkout."""
    from equivalence.workshop import Workshop

    return Workshop(Path(__file__).parents[2] / "build" / "equivalence")


@pytest.fixture(scope="session")
def fp32(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from darkroom_export import export_checkpoint

    target = tmp_path_factory.mktemp("fp32") / "repository"
    assert export_checkpoint(str(checkpoint), target)
    return target


@pytest.fixture(scope="session")
def fp16(checkpoint: Path, fp32: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fp32 repository, replaced by force."""
    from darkroom_export import Precision, export_checkpoint

    target = tmp_path_factory.mktemp("fp16") / "repository"
    shutil.copytree(fp32, target)
    (target / "left-behind.txt").write_text("of the old repository")
    assert export_checkpoint(str(checkpoint), target, precision=Precision.FP16, force=True)
    return target


@pytest.fixture(scope="session")
def make_single_file(
    make_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """The same weights as `make_checkpoint`'s, as one file in the original layout."""
    from ldm_layout import write_ldm_checkpoint

    root = tmp_path_factory.mktemp("single")

    def make_single_file(architecture: str) -> Path:
        path = root / f"{architecture}.safetensors"
        if not path.exists():
            write_ldm_checkpoint(make_checkpoint(architecture), path)
        return path

    return make_single_file


@pytest.fixture(scope="session")
def single_file(make_single_file: Callable[[str], Path]) -> Path:
    return make_single_file("tiny-sd15")


@pytest.fixture
def broken(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint, to break."""
    folder = tmp_path / "broken"
    shutil.copytree(checkpoint, folder)
    return folder


@pytest.fixture
def edit() -> Callable[..., None]:
    def edit(path: Path, **values: Any) -> None:
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return edit
