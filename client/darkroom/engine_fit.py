"""Whether TensorRT engines are for this machine, asked before a server loads them.

An engine runs on GPUs of the model that it was built on, with the TensorRT that built it. One that
was built to be version compatible runs with a newer TensorRT of the same major version too:
docs.nvidia.com/deeplearning/tensorrt, "Version Compatibility" and the support matrix's "Engine
Portability", of TensorRT 10.16. (TensorRT 11 can run such engines of TensorRT 10 as well, which is
not relied upon here.)
"""

import json
import os
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from darkroom.serve_error import ServeError

BACKEND = "tensorrt"
_QUERY = ("nvidia-smi", "--query-gpu=index,uuid,name,compute_cap", "--format=csv,noheader")
_LIBRARY = re.compile(r"libnvinfer\.so\.(\d+\.\d+\.\d+)")
_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Gpu:
    """A model of GPU."""

    name: str
    compute_capability: str

    def __str__(self) -> str:
        return f"{self.name} (compute capability {self.compute_capability})"


@dataclass(frozen=True)
class Machine:
    """What a server would run engines with."""

    gpus: tuple[Gpu, ...]
    """Those that its processes see, in nvidia-smi's order."""
    tensorrt: str | None
    """Such as 10.5.0; None where no library was found, which need not mean that there is none."""

    @classmethod
    def here(cls) -> "Machine":
        return cls(visible_gpus(_run(_QUERY), os.environ), find_tensorrt(_libraries(os.environ)))


@dataclass(frozen=True)
class Engine:
    """An engine, and what it was built with."""

    network: str
    gpu: Gpu
    tensorrt: str
    is_version_compatible: bool
    gpu_indexes: tuple[int, ...]
    """The server's GPUs that have an instance of it; () is all of them."""


def check_engines(repositories: Iterable[Path], machine: Machine | None = None) -> None:
    """Refuse engines that were built for another GPU, or with another TensorRT.

    Args:
        machine: what will run them; None is this one, which is looked at if there are engines.

    Raises:
        ServeError: names an engine, what it was built for, and what is here.
    """
    for repository in repositories:
        engines = read_engines(repository)
        if engines and machine is None:
            machine = Machine.here()
        for engine in engines:
            if machine and (reason := misfit(engine, machine)):
                raise ServeError(
                    f"{repository}: {reason}; build it again on this machine: "
                    f"darkroom build {repository} --backend {BACKEND}"
                )


def misfit(engine: Engine, machine: Machine) -> str | None:
    """Why an engine is not for a machine; None if it is."""
    if not machine.gpus:
        return f"{engine.network} is a TensorRT engine for {engine.gpu}, and no GPU is here"
    for index, gpu in enumerate(machine.gpus):
        is_used = not engine.gpu_indexes or index in engine.gpu_indexes
        if is_used and gpu != engine.gpu:
            return f"{engine.network} was built for {engine.gpu}, but GPU {index} is {gpu}"
    if machine.tensorrt is None or _runs_with(engine, machine.tensorrt):
        return None
    return (
        f"{engine.network} was built with TensorRT {engine.tensorrt}, but here is "
        f"{machine.tensorrt}"
    )


def backend_options(repositories: Iterable[Path]) -> list[str]:
    """What tritonserver has to be told for the engines, as arguments of its command line."""
    is_version_compatible = any(
        engine.is_version_compatible
        for repository in repositories
        for engine in read_engines(repository)
    )
    # Such an engine brings code of its own, which has to be allowed.
    return [f"--backend-config={BACKEND},version-compatible=true"] if is_version_compatible else []


def read_engines(repository: Path) -> list[Engine]:
    """The engines that a repository's manifest tells of.

    Raises:
        ServeError: a record of one is incomplete.
    """
    path = repository / "manifest.json"
    try:
        networks = json.loads(path.read_text())["networks"]
        return [
            Engine(
                network=name,
                gpu=Gpu(record[BACKEND]["gpu"], record[BACKEND]["compute_capability"]),
                tensorrt=record[BACKEND]["version"],
                is_version_compatible=bool(record[BACKEND]["version_compatible"]),
                gpu_indexes=tuple(record[BACKEND]["gpus"]),
            )
            for name, record in networks.items()
            if record.get("backend") == BACKEND
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ServeError(f"{path}: malformed, {error!r}") from None


def visible_gpus(listed: str, environment: Mapping[str, str]) -> tuple[Gpu, ...]:
    """Those that `nvidia-smi` lists and CUDA_VISIBLE_DEVICES does not hide.

    Args:
        listed: lines of an index, a UUID, a name and a compute capability.
    """
    gpus = {}
    for line in listed.splitlines():
        fields = [field.strip() for field in line.split(",")]
        if len(fields) == 4:
            index, uuid, name, capability = fields
            gpus[index, uuid] = Gpu(name, capability)
    chosen = environment.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return tuple(gpus.values())
    names = [name.strip() for name in chosen.split(",")]
    return tuple(
        gpu
        for name in names
        for (index, uuid), gpu in gpus.items()
        # CUDA takes the beginning of a UUID too.
        if name and (name == index or (len(name) > 4 and uuid.startswith(name)))
    )


def find_tensorrt(libraries: Sequence[Path]) -> str | None:
    """TensorRT's version, which is in the name of its library's file."""
    for library in libraries:
        if match := _LIBRARY.fullmatch(library.resolve().name):
            return match[1]
    return None


def _libraries(environment: Mapping[str, str]) -> list[Path]:
    """Where the loader finds TensorRT, in its order."""
    folders = [
        Path(folder) for folder in environment.get("LD_LIBRARY_PATH", "").split(":") if folder
    ]
    found = [path for folder in folders for path in sorted(folder.glob("libnvinfer.so.*"))]
    cached = re.findall(r"libnvinfer\.so\.\d+ .*=> (\S+)", _run(("ldconfig", "-p")))
    return [*found, *map(Path, cached)]


def _run(command: Sequence[str]) -> str:
    """What a program says; nothing where there is no such program, or it fails."""
    path = f"{os.environ.get('PATH', '')}:/sbin:/usr/sbin"
    try:
        made = subprocess.run(  # noqa: S603  our own command lines
            command,
            env={**os.environ, "PATH": path},
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return made.stdout if made.returncode == 0 else ""


def _runs_with(engine: Engine, version: str) -> bool:
    built, here = _numbers(engine.tensorrt), _numbers(version)
    if engine.is_version_compatible:
        return built[:1] == here[:1] and built <= here
    return built == here


def _numbers(version: str) -> tuple[int, ...]:
    """Major, minor and patch; what follows is a build of the same."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])
