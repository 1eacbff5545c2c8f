"""NVIDIA's perf_analyzer: fetched once, run on a server, its time stamps read.

The last release of it that runs on glibc before 2.38 is in the wheel tritonclient 2.50.0. That
wheel does not fit the protobuf that newer packages need, so that it is unpacked, not installed.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VERSION = "2.50.0"
# What the program links to, and under which names the nvidia-pytriton wheel carries it.
LIBRARIES = {"libb64.so.0d": "libb64-*.so.0d", "libcudart.so.12": "libcudart-*.so.12*"}
RUN_TIMEOUT_S = 1800.0
MAX_ERROR_LINES = 8


class PerfAnalyzerError(Exception):
    """perf_analyzer cannot be set up or failed; the text says what to do."""


@dataclass(frozen=True)
class PerfAnalyzer:
    """The program and, in the same folder, its libraries."""

    directory: Path

    @property
    def binary(self) -> Path:
        return self.directory / "perf_analyzer"

    @classmethod
    def install(cls, tools: Path, libraries: Path | None = None) -> "PerfAnalyzer":
        """Set it up in a folder of `tools`, or find it there; the folder is complete or absent.

        Args:
            libraries: where to look for `LIBRARIES`; None looks in the nvidia-pytriton wheel.

        Raises:
            PerfAnalyzerError: the wheel cannot be had, or the program does not run here.
        """
        directory = tools / f"perf_analyzer-{VERSION}"
        if directory.is_dir():
            return cls(directory)
        tools.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=tools, prefix=".perf_analyzer-") as scratch:
            staged = cls(Path(scratch) / "staged")
            staged.directory.mkdir()
            wheel = _download_wheel(Path(scratch))
            extract_binary(wheel, staged.binary)
            copy_libraries(libraries or _pytriton_libraries(), staged.directory)
            staged.check()
            try:
                staged.directory.rename(directory)
            except OSError:
                # Another run was faster; what it set up is the same.
                if not directory.is_dir():
                    raise
        return cls(directory)

    def check(self) -> None:
        """Raises PerfAnalyzerError unless the program starts."""
        try:
            result = self._run(["--version"], capture_output=True, text=True)
        except OSError as error:
            raise PerfAnalyzerError(f"{self.binary} cannot be started: {error}") from error
        if result.returncode != 0:
            raise PerfAnalyzerError(
                f"perf_analyzer cannot be started: {result.stderr.strip()}\n"
                f"It needs {' and '.join(LIBRARIES)}, which nvidia-pytriton normally brings: "
                "pip install 'darkroom[serve]'. Debian has them in the packages libb64-0d and "
                "libcudart12: apt-get install libb64-0d libcudart12"
            )

    def profile(
        self, arguments: Sequence[str], *, is_quiet: bool = False
    ) -> list[tuple[float, float]]:
        """Run it; its tables go to stdout unless `is_quiet`.

        Returns:
            When each request was sent and answered, in seconds.

        Raises:
            PerfAnalyzerError: it failed, or did not end in time.
        """
        with tempfile.TemporaryDirectory(prefix="darkroom-perf-") as scratch:
            export = Path(scratch) / "profile.json"
            stdout = subprocess.DEVNULL if is_quiet else None
            try:
                result = self._run(
                    [*arguments, f"--profile-export-file={export}"],
                    stdout=stdout,
                    stderr=subprocess.PIPE,
                    text=True,
                    timeout=RUN_TIMEOUT_S,
                )
            except subprocess.TimeoutExpired:
                raise PerfAnalyzerError(
                    f"perf_analyzer did not end within {RUN_TIMEOUT_S:g} s"
                ) from None
            if result.returncode != 0:
                # Behind its reason it may print all of its usage.
                reason = "\n".join(list(filter(None, result.stderr.splitlines()))[:MAX_ERROR_LINES])
                raise PerfAnalyzerError(
                    f"perf_analyzer ended with status {result.returncode}: {reason}"
                )
            return read_stamps(export.read_bytes())

    def _run(self, arguments: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
        library_path = [str(self.directory), os.environ.get("LD_LIBRARY_PATH")]
        environment = {
            **os.environ,
            "LD_LIBRARY_PATH": ":".join(filter(None, library_path)),
            # The server is on this machine, whatever proxy the environment names.
            "no_proxy": "127.0.0.1",
        }
        return subprocess.run(  # noqa: S603  our own command line
            [str(self.binary), *arguments], check=False, env=environment, **options
        )


def read_stamps(export: bytes) -> list[tuple[float, float]]:
    """When each request of a --profile-export-file was sent and answered, in seconds."""
    # The file embeds the pictures byte for byte, so that it is no UTF-8. Quotes and control
    # characters in them are escaped, so that any encoding with one character a byte reads it.
    experiments = json.loads(export.decode("latin-1"))["experiments"]
    return [
        (request["timestamp"] / 1e9, request["response_timestamps"][-1] / 1e9)
        for experiment in experiments
        for request in experiment["requests"]
    ]


def extract_binary(wheel: Path, binary: Path) -> None:
    """Take perf_analyzer out of a wheel of tritonclient."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith("/bin/perf_analyzer")]
        if not names:
            raise PerfAnalyzerError(
                f"{wheel.name} has no perf_analyzer; the wheel for Linux on x86-64 has one"
            )
        with archive.open(names[0]) as source, binary.open("wb") as target:
            shutil.copyfileobj(source, target)
    binary.chmod(0o755)


def copy_libraries(source: Path, directory: Path) -> None:
    """Copy what there is of `LIBRARIES` under plain names; the system may have the others."""
    for name, pattern in LIBRARIES.items():
        for found in sorted(source.glob(pattern))[:1]:
            shutil.copyfile(found, directory / name)


def _download_wheel(directory: Path) -> Path:
    requirement = f"tritonclient=={VERSION}"
    options = ["--no-deps", "--disable-pip-version-check", "--quiet", "--dest", str(directory)]
    command = [sys.executable, "-m", "pip", "download", *options, requirement]
    result = subprocess.run(  # noqa: S603  our own command line
        command, check=False, capture_output=True, text=True
    )
    if result.returncode != 0:
        raise PerfAnalyzerError(
            f"perf_analyzer is in the wheel {requirement}, which pip could not download:\n"
            f"{result.stderr.strip()}\n"
            "Run this again where a package index is in reach, or name a folder that has the "
            "wheel by PIP_FIND_LINKS."
        )
    return next(directory.glob("tritonclient-*.whl"))


def _pytriton_libraries() -> Path:
    spec = importlib.util.find_spec("pytriton")
    if spec is None or spec.origin is None:
        raise PerfAnalyzerError("tritonserver is not installed: pip install 'darkroom[serve]'")
    return Path(spec.origin).parent.parent / "nvidia_pytriton.libs"
