"""The tritonserver that is run: one that is installed on this machine, or a Python package's."""

import importlib.util
import os
import re
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from darkroom.serve_error import ServeError

VARIABLE = "DARKROOM_TRITONSERVER"
"""The environment variable that names the folder of another one."""
INSTALLED = Path("/opt/tritonserver")
"""Where NVIDIA's container has it."""
_PYTHON = "python"
_STUB = "triton_python_backend_stub"
_VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"


@dataclass(frozen=True)
class Distribution:
    """A tritonserver with its backends, as NVIDIA's container has them, or its wheel."""

    root: Path
    stub: Path
    """What runs Python models, of this version of Python: the wheel has one for each."""

    @classmethod
    def find(cls, installed: Path = INSTALLED) -> "Distribution":
        """Locate the server: the one that `VARIABLE` names, one at `installed`, or the wheel's.

        Raises:
            ServeError: it is not there, or runs no models of this version of Python.
        """
        chosen = os.environ.get(VARIABLE)
        if chosen:
            root = Path(chosen)
            if not cls._binary_of(root).is_file():
                raise ServeError(f"{VARIABLE}: {cls._binary_of(root)} is missing")
        elif cls._binary_of(installed).is_file():
            root = installed
        else:
            root = _wheel()
        stub = cls._stub_of(root)
        _check_version(stub)
        return cls(root, stub)

    @property
    def binary(self) -> Path:
        return self._binary_of(self.root)

    @property
    def caches(self) -> Path:
        return self.root / "caches"

    @property
    def backends(self) -> list[str]:
        """Triton's names of what it can run models with."""
        return sorted(folder.name for folder in (self.root / "backends").iterdir())

    def backend_directory(self, directory: Path) -> Path:
        """The folder of its backends; if the stub is not there, one in `directory` that has it.

        What is installed is left as it is.
        """
        backends = self.root / "backends"
        if self.stub.parent.parent == backends:
            return backends
        if not directory.exists():
            directory.mkdir()
            for folder in backends.iterdir():
                if folder.name != _PYTHON:
                    (directory / folder.name).symlink_to(folder)
            python = directory / _PYTHON
            python.mkdir()
            for file in (backends / _PYTHON).iterdir():
                if file.is_file():
                    (python / file.name).symlink_to(file)
            (python / self.stub.name).symlink_to(self.stub)
        return directory

    def environment(self) -> dict[str, str]:
        """The environment in which the stub finds this Python, its library and its packages."""
        environment = dict(os.environ)
        library_path = [sysconfig.get_config_var("LIBDIR"), environment.get("LD_LIBRARY_PATH")]
        environment["LD_LIBRARY_PATH"] = ":".join(filter(None, library_path))
        # An embedded Python looks for its home beside the first `python3` on the path.
        environment["PATH"] = f"{Path(sys.executable).parent}:{environment.get('PATH', '')}"
        # From 1.29 on, ONNX Runtime tells its maker of every session that is opened.
        environment.setdefault("ORT_DISABLE_TELEMETRY", "1")
        return environment

    @staticmethod
    def _binary_of(root: Path) -> Path:
        return root / "bin" / "tritonserver"

    @staticmethod
    def _stub_of(root: Path) -> Path:
        stubs = root / "python_backend_stubs"
        folder = stubs / _VERSION if stubs.is_dir() else root / "backends" / _PYTHON
        if not (folder / _STUB).is_file():
            raise ServeError(
                f"{root}: has no Python backend for Python {_VERSION}, {folder / _STUB} is missing"
            )
        return folder / _STUB


def _wheel() -> Path:
    spec = importlib.util.find_spec("pytriton")
    if spec is None or spec.origin is None:
        raise ServeError("tritonserver is not installed: pip install 'darkroom[serve]'")
    return Path(spec.origin).parent / "tritonserver"


def _check_version(stub: Path) -> None:
    """Refuse a stub of another version of Python, which would not find the packages of this one."""
    match = re.search(rb"libpython(\d+\.\d+)\.so", stub.read_bytes())
    version = match[1].decode() if match else _VERSION
    if version != _VERSION:
        raise ServeError(
            f"{stub}: runs models in Python {version}, but this is Python {_VERSION}; install "
            f"darkroom for {version}, or let {VARIABLE} name another tritonserver"
        )
