"""The tritonserver that a Python package carries."""

import importlib.util
import os
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from darkroom.serve_error import ServeError


@dataclass(frozen=True)
class Distribution:
    """The parts of Triton that the nvidia-pytriton wheel carries."""

    binary: Path
    python_backend: Path
    stub: Path
    caches: Path

    @classmethod
    def find(cls) -> "Distribution":
        """Locate the server for this Python.

        Raises:
            ServeError: it is not installed, or has no stub for this version of Python.
        """
        spec = importlib.util.find_spec("pytriton")
        if spec is None or spec.origin is None:
            raise ServeError("tritonserver is not installed: pip install 'darkroom[serve]'")
        root = Path(spec.origin).parent / "tritonserver"
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        stub = root / "python_backend_stubs" / version / "triton_python_backend_stub"
        if not stub.is_file():
            raise ServeError(f"nvidia-pytriton has no Python backend for Python {version}: {stub}")
        return cls(
            binary=root / "bin" / "tritonserver",
            python_backend=root / "backends" / "python",
            stub=stub,
            caches=root / "caches",
        )

    def assemble_backend(self, directory: Path) -> None:
        """Make a backend folder with the stub that fits; the installed wheel is left as it is."""
        backend = directory / "python"
        backend.mkdir()
        for file in self.python_backend.iterdir():
            if file.is_file():
                (backend / file.name).symlink_to(file)
        (backend / self.stub.name).symlink_to(self.stub)

    def environment(self) -> dict[str, str]:
        """The environment in which the stub finds this Python, its library and its packages."""
        environment = dict(os.environ)
        library_path = [sysconfig.get_config_var("LIBDIR"), environment.get("LD_LIBRARY_PATH")]
        environment["LD_LIBRARY_PATH"] = ":".join(filter(None, library_path))
        # An embedded Python looks for its home beside the first `python3` on the path.
        environment["PATH"] = f"{Path(sys.executable).parent}:{environment.get('PATH', '')}"
        return environment
