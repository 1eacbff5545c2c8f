"""A tritonserver of one's own: find it, start it on a repository, see it ready, stop it."""

import contextlib
import ctypes
import os
import resource
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import tritonclient.grpc
from google.protobuf import json_format
from tritonclient.utils import InferenceServerException

from darkroom.background import in_background
from darkroom.client import Client
from darkroom.distribution import VARIABLE, Distribution
from darkroom.engine_fit import backend_options, check_engines
from darkroom.exceptions import DarkroomError, QueueFull
from darkroom.guard import Guard
from darkroom.model_view import CONFIG, model_repository, read_config
from darkroom.picture import Picture
from darkroom.ports import Ports, check_ports, free_ports
from darkroom.probe import probe
from darkroom.process import is_alive
from darkroom.progress import Progress, silent_progress
from darkroom.serve_error import ServeError, ServeInterrupted
from darkroom.served_models import SERVER_MODEL, TORCH, ServedModel, Source, read_models
from darkroom.server_log import ServerLog
from darkroom.stubs import Stubs, bury_group, kill_group
from darkroom.trace_config import check_trace_setting

__all__ = ["Ports", "ServeError", "ServeInterrupted", "Server", "Source", "free_ports"]

START_TIMEOUT_S = 600.0
EXIT_TIMEOUT_S = 10
STOP_TIMEOUT_S = EXIT_TIMEOUT_S + 5.0
"""Triton ends by itself after the first, if it can."""
STACK_BYTES = 256 * 2**20
"""Of each of the server's threads, as far as it needs that much."""
_IN_PROCESS = {None: None, "0": False, "1": True}
_FOR_IN_PROCESS = ("device", "compile", "cuda_graphs", "row_buckets")
"""The engine's settings that are of networks in its process."""
_CALL_TIMEOUT_S = 1.0
_POLL_S = 0.1
_PREFIX = "darkroom-"
_SHM = Path("/dev/shm")  # noqa: S108  where Triton's Python backend keeps its shared memory


class Server:
    """A running tritonserver with the models of one repository, or of several.

    It ends when the thread that started it does, so that a killed program leaves no server.

    >>> with Server(Path("build/shapes")) as server:                 # doctest: +SKIP
    ...     Client(server.grpc_url).generate("a red circle")
    """

    is_stopping = False
    """Set it to end what the server is waiting for: a signal handler may do no more than that."""

    def __init__(
        self,
        repositories: Path | Sequence[Path | Source],
        ports: Ports | None = None,
        progress: Progress = silent_progress,
        response_cache_bytes: int = 0,
        *,
        log_file: Path | None = None,
        trace_config: Sequence[str] = (),
        engine_parameters: Mapping[str, str] | None = None,
        start_timeout_s: float = START_TIMEOUT_S,
    ) -> None:
        """Prepare a server.

        Args:
            repositories: of several, the model of the first that no name was chosen for is called
                `stable_diffusion`, and those of the others as their folders.
            response_cache_bytes: memory for whole answers: a request that equals an earlier one in
                every input is then answered without the engine; 0 keeps none.
            log_file: what the server's log is appended to; without one it goes with the server.
            trace_config: Triton's settings of its tracing, such as "mode=opentelemetry".
            engine_parameters: settings of all engines, in place of those in their config.pbtxt.
                `in_process` is "1" or "0" for repositories whose networks are PyTorch's: these run
                in the engine's process, or as models of Triton's; without it they run in process.
            start_timeout_s: how long it may take until a picture is made, at every start.

        Raises:
            ServeError: there is no exported repository, a name that no model can have, a trace
                setting that Triton would not take or not heed, or a setting of an engine that is
                not for where its networks run.
        """
        for setting in trace_config:
            check_trace_setting(setting)
        if isinstance(repositories, Path):
            repositories = [repositories]
        self._engine_parameters = engine_parameters or {}
        in_process = self._engine_parameters.get("in_process")
        if in_process not in _IN_PROCESS:
            raise ServeError(f"in_process: {in_process!r} is neither 0 nor 1")
        self.models = read_models(
            [it if isinstance(it, Source) else Source(it) for it in repositories],
            is_in_process=_IN_PROCESS[in_process],
        )
        self._check_parameters()
        self.repository = self.models[0].repository
        self.networks = [network for model in self.models for network in model.networks]
        self.ports = ports or Ports()
        self.start_timeout_s = start_timeout_s
        self._progress = progress
        self._response_cache_bytes = response_cache_bytes
        self._trace_config = trace_config
        _remove_leftovers()
        self._runtime = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-"))
        self._sockets = self._runtime / "sockets"
        self._model_repository = self.repository
        self._log = ServerLog(log_file or self._runtime / "tritonserver.log")
        self._shm_prefix = f"{self._runtime.name}_"
        self._process: subprocess.Popen[bytes] | None = None
        self._stubs: Stubs | None = None
        self._guard: Guard | None = None

    @property
    def reloadable(self) -> list[str]:
        """The models that can be loaded anew while the others go on: no client waits for them."""
        return [SERVER_MODEL, *self.networks]

    @property
    def _loaded_first(self) -> list[str]:
        """What the server loads when it starts; engines that save memory load their networks."""
        return self.reloadable if self._keeps_all else [SERVER_MODEL]

    @property
    def _keeps_all(self) -> bool:
        """No engine saves memory."""
        return self._engine_parameters.get("memory_profile", "full") == "full"

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
        return self._log.path

    def start(self) -> None:
        """Start the server and return when it has made a probe picture.

        Raises:
            ServeInterrupted: it was told to stop.
            ServeError: a port is taken, or the server or a model cannot be started.
        """
        try:
            check_ports(self.ports)
            check_engines(model.repository for model in self.models)
            give_up_at = time.monotonic() + self.start_timeout_s
            self._bring_up(give_up_at, self._progress)
            with self._progress("making a probe picture"):
                self._probe(give_up_at)
        except BaseException:
            self.stop()
            raise

    def restart(self) -> None:
        """End the server at once, whose clients get an error, and start it anew on the same ports.

        It returns when the models are loaded; no probe picture has been made yet.

        Raises:
            ServeInterrupted, ServeError: as of `start`.
        """
        self._end(is_graceful=False)
        self._bring_up(time.monotonic() + self.start_timeout_s, silent_progress)

    def reload(self, model: str) -> None:
        """Unload a model and load it again, while the engines go on.

        Raises:
            ServeInterrupted, ServeError: as of `start`.
        """
        self._call(f"{model} cannot be unloaded", lambda triton: triton.unload_model(model))
        self._call(f"{model} cannot be loaded", lambda triton: triton.load_model(model))

    def make_probe_pictures(self, timeout: float) -> list[Picture]:
        """Ask each engine in turn for the smallest picture there is, and give it so much time.

        Raises:
            QueueFull: too many requests wait for one of them; all others made their picture.
            DarkroomError: one of them failed, or gave no answer.
        """
        pictures, refusals = [], []
        for model in self.models:
            try:
                pictures.append(self._probe_picture(model, timeout))
            except QueueFull as error:
                refusals.append(error)
        if refusals:
            raise refusals[0]
        return pictures

    def dead_stubs(self) -> dict[int, str]:
        """The models whose process has died, by process id, those that were reloaded too."""
        return self._stubs.dead() if self._stubs else {}

    def check(self) -> None:
        """Raise if there is no reason to wait for the server any more.

        Raises:
            ServeInterrupted: it was told to stop.
            ServeError: the server process ended by itself.
        """
        if self.is_stopping:
            raise ServeInterrupted("interrupted")
        end = _end_of(self._process) if self._process else None
        if end:
            raise self.failure(f"tritonserver {end}")

    def failure(self, what: str) -> ServeError:
        """An error with the last ones of the server's log beneath it."""
        return ServeError("\n".join([what, *self._log.problems()]))

    def stop(self) -> None:
        """Stop the server and remove all it left: processes, shared memory, files."""
        self._end(is_graceful=True)
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

    def _check_parameters(self) -> None:
        for model in self.models:
            chosen = [key for key in _FOR_IN_PROCESS if key in self._engine_parameters]
            if chosen and not model.is_in_process:
                raise ServeError(
                    f"{chosen[0]}: is for networks in the engine's process, but those of "
                    f"{model.repository} are models of Triton's"
                )
            if model.is_in_process and not self._keeps_all:
                profile = self._engine_parameters["memory_profile"]
                raise ServeError(
                    f"memory_profile: {profile} is for networks that are models of Triton's, but "
                    f"those of {model.repository} run in the engine's process, where there is full"
                )

    def _check_backends(self, distribution: Distribution) -> None:
        for model in self.models:
            missing = sorted(model.triton_backends - set(distribution.backends))
            if missing:
                raise ServeError(
                    f"{model.repository}: its networks need Triton's backend {missing[0]}, but the "
                    f"tritonserver in {distribution.root} has {', '.join(distribution.backends)}; "
                    f"NVIDIA's container has it, or {VARIABLE} names another folder"
                )

    def _bring_up(self, give_up_at: float, progress: Progress) -> None:
        with progress("starting tritonserver and loading the networks"):
            self._launch()
            self._wait_until_live(give_up_at)
        with progress("loading the engine"):
            for model in self.models:
                self._load(model.name, "the engine", self._engine_config(model))
            for model in self.models:
                for face in model.faces:
                    self._load(face, face)

    def _end(self, *, is_graceful: bool) -> None:
        """End all processes of the server, and remove their shared memory."""
        process = self._process
        if process is None:
            return
        # Requests that run may end, but not without a network or with the engine's process dead:
        # the clients would only wait in vain until the server is gone.
        lost = self._stubs.lost_models() - {SERVER_MODEL} if self._stubs else set()
        if is_graceful and not lost:
            os.kill(process.pid, signal.SIGTERM)
            give_up_at = time.monotonic() + STOP_TIMEOUT_S
            while not _end_of(process) and time.monotonic() < give_up_at:
                time.sleep(0.01)
        # The stubs are in the server's process group; one that outlived it is stuck.
        kill_group(process.pid)
        process.wait()
        bury_group(process.pid)
        for region in _SHM.glob(f"{self._shm_prefix}*"):
            region.unlink(missing_ok=True)
        if self._guard:
            self._guard.dismiss()
        self._process = self._stubs = self._guard = None

    def _launch(self) -> None:
        distribution = Distribution.find()
        self._check_backends(distribution)
        backends = distribution.backend_directory(self._runtime / "backends")
        self._model_repository = model_repository(self.models, self._runtime / "models")
        # Where the engine listens; what an earlier one left there is no use to anybody.
        shutil.rmtree(self._sockets, ignore_errors=True)
        self._sockets.mkdir(mode=0o700)
        ports = self.ports
        command = [
            str(distribution.binary),
            f"--model-repository={self._model_repository}",
            f"--backend-directory={backends}",
            f"--backend-config=python,shm-region-prefix-name={self._shm_prefix}",
            f"--http-address={ports.host}",
            f"--grpc-address={ports.host}",
            f"--metrics-address={ports.host}",
            f"--http-port={ports.http}",
            f"--grpc-port={ports.grpc}",
            f"--metrics-port={ports.metrics}",
            "--disable-auto-complete-config",
            f"--exit-timeout-secs={EXIT_TIMEOUT_S}",
            # An engine calls the networks, so that it is loaded after them, through the API.
            "--model-control-mode=explicit",
            *(f"--load-model={name}" for name in self._loaded_first),
            *(f"--trace-config={setting}" for setting in self._trace_config),
            *backend_options(model.repository for model in self.models),
        ]
        if self._response_cache_bytes:
            command += [
                f"--cache-config=local,size={self._response_cache_bytes}",
                f"--cache-directory={distribution.caches}",
            ]
        try:
            log = self._log.open()
        except OSError as error:
            raise ServeError(f"the log file {self.log}: {error.strerror}") from None
        with log:
            self._process = subprocess.Popen(  # noqa: S603  our own command line
                command,
                env={
                    **distribution.environment(),
                    "DARKROOM_RUNTIME_DIR": str(self._sockets),
                    # For an engine that has networks loaded and unloaded.
                    "DARKROOM_HTTP_URL": self.http_url,
                },
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                preexec_fn=_prepare_process,  # noqa: PLW1509  two calls, no locks
            )
        self._stubs = Stubs(self._process.pid)
        self._guard = Guard(
            self._process.pid, str(_SHM / self._shm_prefix), patience_s=int(STOP_TIMEOUT_S)
        )

    def _wait_until_live(self, give_up_at: float) -> None:
        with tritonclient.grpc.InferenceServerClient(self.grpc_url) as triton:
            while True:
                self.check()
                try:
                    if triton.is_server_ready(client_timeout=_CALL_TIMEOUT_S):
                        return
                except InferenceServerException:
                    pass
                if time.monotonic() > give_up_at:
                    raise self.failure("the networks were not loaded in time")
                time.sleep(_POLL_S)

    def _load(self, model: str, called: str, config: str | None = None) -> None:
        self._call(
            f"{called} cannot be loaded", lambda triton: triton.load_model(model, config=config)
        )

    def _call(
        self, failure: str, call: Callable[[tritonclient.grpc.InferenceServerClient], None]
    ) -> None:
        """Make a call of Triton's API, which may take minutes."""

        def make() -> None:
            with tritonclient.grpc.InferenceServerClient(self.grpc_url) as triton:
                call(triton)

        try:
            self._wait_for(in_background(make))
        except InferenceServerException as error:
            raise self.failure(f"{failure}: {error.message()}") from error

    def _engine_config(self, model: ServedModel) -> str | None:
        """The engine's config as JSON where it differs from the repository's, else None."""
        parameters = dict(self._engine_parameters)
        if TORCH in model.backends:
            # Whatever the config says: its networks are loaded here, or there.
            parameters["in_process"] = str(int(model.is_in_process))
        if not self._response_cache_bytes and not parameters:
            return None
        config = read_config(self._model_repository / model.name / CONFIG)
        if self._response_cache_bytes:
            config.response_cache.enable = True
        for key, value in parameters.items():
            config.parameters[key].string_value = value
        return str(json_format.MessageToJson(config, preserving_proto_field_name=True))

    def _probe(self, give_up_at: float) -> None:
        timeout = give_up_at - time.monotonic()
        try:
            self._wait_for(in_background(lambda: self.make_probe_pictures(timeout)))
        except ServeError:
            raise
        except DarkroomError as error:
            raise self.failure(f"the probe picture failed: {error}") from error

    def _probe_picture(self, model: ServedModel, timeout: float) -> Picture:
        with Client(self.grpc_url, model=model.name) as client:
            try:
                return probe(client, timeout, model.min_size, model.first_mode)
            except DarkroomError as error:
                if len(self.models) == 1:
                    raise
                raise type(error)(f"{model.name}: {error}") from error

    def _wait_for(self, answer: Future[Any]) -> None:
        """Wait for an answer of the server for as long as one can still come.

        Raises:
            ServeInterrupted: the server was told to stop.
            ServeError: the server died, or the process of a model that answers clients.
        """
        while not wait_for([answer], _POLL_S).done:
            self.check()
            for model in self.dead_stubs().values():
                if model not in self.reloadable:
                    raise self.failure(f"{model} died")
        answer.result()


def _end_of(process: subprocess.Popen[bytes]) -> str | None:
    """How a process ended, if it did; it stays a zombie, so that its id remains its own."""
    try:
        end = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:  # this program ignores how its children end
        return "is gone"
    if end is None:
        return None
    if end.si_code == os.CLD_EXITED:
        return f"ended with status {end.si_status}"
    return f"was killed by signal {end.si_status} ({signal.strsignal(end.si_status)})"


def _remove_leftovers() -> None:
    """Remove what servers left behind whose program was killed and could not clean up."""
    for entry in (*Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"), *_SHM.glob(f"{_PREFIX}*")):
        owner = entry.name.removeprefix(_PREFIX).partition("-")[0]
        if not owner.isdecimal() or is_alive(int(owner)):
            continue
        with contextlib.suppress(OSError):
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def _prepare_process() -> None:
    """Prepare the process that becomes the server.

    It is to stop when its parent is gone, even if that was killed, which the kernel sees to. And it
    needs more stack than the usual 8 MB: there Triton puts the bodies of HTTP requests, twice, and
    3 MB of a picture in JSON end the server.
    """
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
    _, most = resource.getrlimit(resource.RLIMIT_STACK)
    size = STACK_BYTES if most == resource.RLIM_INFINITY else min(STACK_BYTES, most)
    resource.setrlimit(resource.RLIMIT_STACK, (size, most))
