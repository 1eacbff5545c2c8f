"""Which tritonserver is run, and whether it can run what is to be served."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from darkroom.distribution import VARIABLE, Distribution
from darkroom.serve_error import ServeError
from darkroom.server import Server, free_ports

VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"
STUB = "triton_python_backend_stub"

Install = Callable[..., Path]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Puts a tritonserver where NVIDIA's container has its parts; none is chosen yet."""
    monkeypatch.delenv(VARIABLE, raising=False)

    def install(*backends: str, python: str = VERSION) -> Path:
        root = tmp_path / "tritonserver"
        for backend in ("python", *backends):
            (root / "backends" / backend).mkdir(parents=True)
        (root / "backends" / "python" / STUB).write_bytes(b"ELF libpython%b.so" % python.encode())
        (root / "bin").mkdir()
        (root / "bin" / "tritonserver").touch()
        return root

    return install


def test_an_installed_server_is_found_by_itself(install: Install, tmp_path: Path) -> None:
    root = install("onnxruntime", "tensorrt")
    found = Distribution.find(root)

    assert (found.root, found.binary) == (root, root / "bin" / "tritonserver")
    assert found.caches == root / "caches"
    assert found.backends == ["onnxruntime", "python", "tensorrt"]
    assert found.backend_directory(tmp_path / "made") == root / "backends"
    assert not (tmp_path / "made").exists()


def test_another_is_chosen_by_the_environment(
    install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = install()
    monkeypatch.setenv(VARIABLE, str(root))

    assert Distribution.find(tmp_path / "another").root == root


def test_a_wheel_has_a_stub_for_each_python_which_is_put_beside_the_backend(
    install: Install, tmp_path: Path
) -> None:
    root = install("onnxruntime", python="3.1")
    (root / "backends" / "python" / "model.py").write_text("# the backend's")
    stub = root / "python_backend_stubs" / VERSION / STUB
    stub.parent.mkdir(parents=True)
    stub.write_text("this one")
    found = Distribution.find(root)
    (root / "backends" / "python" / STUB).unlink()
    made = found.backend_directory(tmp_path / "made")

    assert made == tmp_path / "made"
    assert (made / "python" / STUB).read_text() == "this one"
    assert (made / "python" / "model.py").read_text() == "# the backend's"
    assert (made / "onnxruntime").resolve() == root / "backends" / "onnxruntime"
    # A server that is restarted finds it there.
    assert found.backend_directory(made) == made


@pytest.mark.usefixtures("install")
def test_without_any_the_wheel_is_taken(tmp_path: Path) -> None:
    pytest.importorskip("pytriton")

    assert Distribution.find(tmp_path / "none").binary.is_file()


def test_a_chosen_one_that_is_none_is_refused(
    install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "none"))

    with pytest.raises(ServeError, match=f"{VARIABLE}: .*none/bin/tritonserver is missing"):
        Distribution.find(install())


def test_one_without_a_python_backend_is_refused(install: Install) -> None:
    root = install()
    (root / "backends" / "python" / STUB).unlink()

    with pytest.raises(ServeError, match=f"no Python backend for Python {VERSION}, .* is missing"):
        Distribution.find(root)


def test_one_of_another_python_is_refused(install: Install) -> None:
    with pytest.raises(ServeError, match=f"in Python 3.1, but this is Python {VERSION}; install"):
        Distribution.find(install(python="3.1"))


def test_a_backend_that_is_not_there_is_named_before_the_start(
    install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, str(install("tensorrt")))
    repository = tmp_path / "repository"
    repository.mkdir()
    networks = {"text_encoder": {"backend": "python"}, "unet": {"backend": "onnxruntime"}}
    manifest = {"networks": networks, "limits": {"min_size": 32}}
    (repository / "manifest.json").write_text(json.dumps(manifest))

    with pytest.raises(
        ServeError, match=r"repository: .* need .* backend onnxruntime, .* has python, tensorrt;"
    ):
        Server(repository, free_ports()).start()


def test_onnx_runtime_is_told_to_send_nothing_unless_somebody_wants_it(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    distribution = Distribution.find(install())
    monkeypatch.delenv("ORT_DISABLE_TELEMETRY", raising=False)
    assert distribution.environment()["ORT_DISABLE_TELEMETRY"] == "1"

    monkeypatch.setenv("ORT_DISABLE_TELEMETRY", "0")
    assert distribution.environment()["ORT_DISABLE_TELEMETRY"] == "0"
