"""A tritonserver of one's own: find it, start it on a repository, see it ready, stop it."""

import contextlib
import ctypes
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import tritonclient.grpc
from google.protobuf import json_format, text_format
from tritonclient.grpc import model_config_pb2
from tritonclient.utils import InferenceServerException

from darkroom.client import Client
from darkroom.exceptions import DarkroomError
from darkroom.process import is_alive
from darkroom.progress import Progress, silent_progress
from darkroom.protocol import MODEL

START_TIMEOUT_S = 600.0
STOP_TIMEOUT_S = 30.0
_PREFIX = "darkroom-"
_SHM = Path("/dev/shm")  # noqa: S108  where Triton's Python backend keeps its shared memory


class ServeError(DarkroomError):
    """The server cannot be started, or died; the text says why and what to do."""


@dataclass(frozen=True)
class Ports:
    """Where the server listens."""

    host: str = "127.0.0.1"
    http: int = 8000
    grpc: int = 8001
    metrics: int = 8002


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


class Server:
    """A running tritonserver with the models of one repository.

    It ends when the thread that started it does, so that a killed program leaves no server.

    >>> with Server(Path("build/shapes")) as server:                 # doctest: +SKIP
    ...     Client(server.grpc_url).generate("a red circle")
    """

    def __init__(
        self,
        repository: Path,
        ports: Ports | None = None,
        progress: Progress = silent_progress,
        response_cache_bytes: int = 0,
    ) -> None:
        """Prepare a server.

        Args:
            response_cache_bytes: memory for whole answers: a request that equals an earlier one in
                every input is then answered without the engine; 0 keeps none.
        """
        self.repository = repository.resolve()
        self.ports = ports or Ports()
        self._progress = progress
        self._response_cache_bytes = response_cache_bytes
        manifest = _read_manifest(self.repository)
        self._networks = list(manifest["networks"])
        self._min_size = int(manifest["limits"]["min_size"])
        _remove_leftovers()
        self._runtime = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-"))
        self._shm_prefix = f"{self._runtime.name}_"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def grpc_url(self) -> str:
        return f"{self.ports.host}:{self.ports.grpc}"

    @property
    def http_url(self) -> str:
        return f"http://{self.ports.host}:{self.ports.http}"

    @property
    def metrics_url(self) -> str:
        return f"http://{self.ports.host}:{self.ports.metrics}/metrics"

    @property
    def log(self) -> Path:
        return self._runtime / "tritonserver.log"

    def start(self, timeout: float = START_TIMEOUT_S) -> None:
        """Start the server and return when it has made a probe picture.

        Raises:
            ServeError: a port is taken, or the server or a model cannot be started.
        """
        try:
            _check_ports(self.ports)
            give_up_at = time.monotonic() + timeout
            with self._progress("starting tritonserver and loading the networks"):
                self._launch()
                self._wait_until_live(give_up_at)
            with self._progress("loading the engine, and making a probe picture"):
                self._load_engine()
                self._probe(give_up_at)
        except BaseException:
            self.stop()
            raise

    def wait(self, is_stopping: threading.Event) -> None:
        """Block until `is_stopping` is set.

        Raises:
            ServeError: the server process ended by itself.
        """
        while not is_stopping.wait(0.2):
            self._check_alive()

    def stop(self) -> None:
        """Stop the server and remove all it left: processes, shared memory, files."""
        process = self._process
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_TIMEOUT_S)
            # The stubs are in the server's process group; one that outlived it is stuck.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for region in _SHM.glob(f"{self._shm_prefix}*"):
            region.unlink(missing_ok=True)
        shutil.rmtree(self._runtime, ignore_errors=True)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def _launch(self) -> None:
        distribution = Distribution.find()
        backends = self._runtime / "backends"
        backends.mkdir()
        distribution.assemble_backend(backends)
        ports = self.ports
        command = [
            str(distribution.binary),
            f"--model-repository={self.repository}",
            f"--backend-directory={backends}",
            f"--backend-config=python,shm-region-prefix-name={self._shm_prefix}",
            f"--http-address={ports.host}",
            f"--grpc-address={ports.host}",
            f"--metrics-address={ports.host}",
            f"--http-port={ports.http}",
            f"--grpc-port={ports.grpc}",
            f"--metrics-port={ports.metrics}",
            "--disable-auto-complete-config",
            "--exit-timeout-secs=10",
            # The engine calls the networks, so that it is loaded after them, through the API.
            "--model-control-mode=explicit",
            *(f"--load-model={name}" for name in self._networks),
        ]
        if self._response_cache_bytes:
            command += [
                f"--cache-config=local,size={self._response_cache_bytes}",
                f"--cache-directory={distribution.caches}",
            ]
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(  # noqa: S603  our own command line
                command,
                env=distribution.environment(),
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                preexec_fn=_die_with_parent,  # noqa: PLW1509  one call, no locks, no allocation
            )

    def _wait_until_live(self, give_up_at: float) -> None:
        with tritonclient.grpc.InferenceServerClient(self.grpc_url) as triton:
            while True:
                self._check_alive()
                try:
                    if triton.is_server_live() and triton.is_server_ready():
                        return
                except InferenceServerException:
                    pass
                if time.monotonic() > give_up_at:
                    raise self._failure("the networks were not loaded in time")
                time.sleep(0.1)

    def _load_engine(self) -> None:
        with tritonclient.grpc.InferenceServerClient(self.grpc_url) as triton:
            try:
                triton.load_model(MODEL, config=self._engine_config())
            except InferenceServerException as error:
                raise self._failure(f"the engine cannot be loaded: {error.message()}") from error

    def _engine_config(self) -> str | None:
        """The engine's config as JSON where it differs from the repository's, else None."""
        if not self._response_cache_bytes:
            return None
        text = (self.repository / MODEL / "config.pbtxt").read_text()
        config = text_format.Parse(text, model_config_pb2.ModelConfig())
        config.response_cache.enable = True
        return str(json_format.MessageToJson(config, preserving_proto_field_name=True))

    def _probe(self, give_up_at: float) -> None:
        """Make a picture: only that shows that all of it works."""
        with Client(self.grpc_url) as client:
            try:
                client.generate(
                    "",
                    num_inference_steps=1,
                    seed=0,
                    width=self._min_size,
                    height=self._min_size,
                    timeout=give_up_at - time.monotonic(),
                )
            except DarkroomError as error:
                raise self._failure(f"the probe picture failed: {error}") from error

    def _check_alive(self) -> None:
        if self._process is not None and self._process.poll() is not None:
            raise self._failure(f"tritonserver ended with status {self._process.returncode}")

    def _failure(self, what: str) -> ServeError:
        problems = []
        if self.log.exists():
            lines = self.log.read_text(errors="replace").splitlines()
            problems = [line for line in lines if line.startswith(("E", "error:"))]
        # Triton prints a Python traceback with escaped line ends behind its one telling sentence.
        sentences = [line.split("\\n\\nAt:")[0] for line in problems]
        return ServeError("\n".join([what, *dict.fromkeys(sentences[-4:])]))


def _read_manifest(repository: Path) -> dict[str, Any]:
    """What the manifest says of a repository; the engine checks it in full."""
    path = repository / "manifest.json"
    try:
        manifest: dict[str, Any] = json.loads(path.read_text())
        if not isinstance(manifest["networks"], dict):
            raise TypeError("networks is no object")
        int(manifest["limits"]["min_size"])
    except FileNotFoundError:
        raise ServeError(
            f"{path} is missing: {repository} is no exported repository; "
            "darkroom export CHECKPOINT REPOSITORY makes one"
        ) from None
    except OSError as error:
        raise ServeError(f"{path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ServeError(f"{path}: malformed, {error!r}") from None
    return manifest


def _remove_leftovers() -> None:
    """Remove what servers left behind whose program was killed and could not clean up."""
    for entry in (*Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"), *_SHM.glob(f"{_PREFIX}*")):
        owner = entry.name.removeprefix(_PREFIX).partition("-")[0]
        if not owner.isdecimal() or is_alive(int(owner)):
            continue
        with contextlib.suppress(OSError):
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def _check_ports(ports: Ports) -> None:
    numbers = {"http": ports.http, "grpc": ports.grpc, "metrics": ports.metrics}
    for name, number in numbers.items():
        with socket.socket() as probe:
            # As the server does, so that connections of a stopped one do not count.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((ports.host, number))
            except (OSError, OverflowError) as error:
                raise ServeError(
                    f"port {number} of {ports.host} cannot be used: {error}; "
                    f"--{name}-port chooses another"
                ) from None


def free_ports(names: Iterable[str] = ("http", "grpc", "metrics")) -> Ports:
    """Ports of the loopback that nobody listens on now."""
    sockets = {name: socket.socket() for name in names}
    for sock in sockets.values():
        sock.bind(("127.0.0.1", 0))
    numbers = {name: sock.getsockname()[1] for name, sock in sockets.items()}
    for sock in sockets.values():
        sock.close()
    return Ports(**numbers)


def _die_with_parent() -> None:
    """Ask the kernel to stop this process when its parent is gone, even if that was killed."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
