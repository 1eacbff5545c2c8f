"""Keeps a server serving: sees what died or hangs, and heals it."""

import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

from darkroom.background import in_background
from darkroom.exceptions import QueueFull, RequestTimeout
from darkroom.picture import Picture
from darkroom.serve_error import ServeError, ServeInterrupted
from darkroom.server import Server

MAX_FAILED_PROBES = 3
MAX_HEALS = 3


@dataclass(frozen=True)
class Patience:
    """How long the supervisor waits, in seconds."""

    poll_s: float = 0.25
    """From one look at the processes to the next."""
    probe_interval_s: float = 10.0
    """From one probe to the next."""
    probe_timeout_s: float = 120.0
    """What a probe picture may take, which nobody goes before."""
    healthy_s: float = 60.0
    """After this time without a heal, those before it no longer count."""
    retry_s: float = 1.0
    """From one probe to the next while a full queue keeps a heal from being shown."""


class Supervisor:
    """Watches a running server until it is to stop.

    * The process of a network dies: that network is loaded anew. The engine keeps its pictures
      meanwhile, and goes on with them. The same goes for the model that publishes the metrics.
    * The process of a model that answers clients dies, and the answers it owes with it: Triton
      would let those clients wait for ever, so that the whole server is started anew.
    * The server itself dies, gives no probe picture in time, or fails several in a row: the same.

    A probe asks every engine for a picture, and a heal is over when all have made theirs. Without a
    healthy minute between them, heals of a model give way to a restart, and restarts to the end of
    it all.
    """

    def __init__(
        self,
        server: Server,
        tell: Callable[[str], None],
        patience: Patience | None = None,
    ) -> None:
        """Prepare to watch a server that has been started.

        Args:
            tell: takes a line for each thing that happens.
        """
        self._server = server
        self._tell = tell
        self._patience = patience or Patience()
        self._probe: Future[list[Picture]] | None = None
        self._next_probe_at = time.monotonic() + self._patience.probe_interval_s
        self._num_failed_probes = 0
        self._healthy_since = time.monotonic()
        self._healing_since: float | None = None
        self._num_reloads = 0
        self._num_restarts = 0
        self._known_dead: set[int] = set()

    def run(self) -> None:
        """Watch and heal until the server's `is_stopping` is set.

        Raises:
            ServeError: restarts do not help.
        """
        try:
            while True:
                self._look()
                time.sleep(self._patience.poll_s)
        except ServeInterrupted:
            pass

    def _look(self) -> None:
        try:
            self._server.check()
            self._look_at_stubs()
            self._look_at_probe()
        except ServeInterrupted:
            raise
        except ServeError as error:
            self._restart(_first_line(error))

    def _look_at_stubs(self) -> None:
        dead = self._server.dead_stubs()
        died = [model for stub, model in dead.items() if stub not in self._known_dead]
        self._known_dead |= dead.keys()
        for model in dict.fromkeys(died):
            if model not in self._server.reloadable:
                raise ServeError(f"{model} died")
        for model in dict.fromkeys(died):
            self._reload(model)

    def _look_at_probe(self) -> None:
        now = time.monotonic()
        if self._probe is None:
            if now >= self._next_probe_at:
                self._probe = self._ask()
            return
        if not self._probe.done():
            return
        error = self._probe.exception()
        self._probe = None
        self._next_probe_at = now + self._patience.probe_interval_s
        if error is None:
            self._num_failed_probes = 0
            self._heal_is_over()
        elif isinstance(error, QueueFull):
            # Whoever refuses is alive; but whether a heal has helped, only a picture shows.
            self._num_failed_probes = 0
            if self._healing_since is not None:
                self._next_probe_at = now + self._patience.retry_s
        elif isinstance(error, RequestTimeout):
            raise ServeError(f"no probe picture was made in time ({error})")
        else:
            self._num_failed_probes += 1
            problem = f"a probe picture failed: {_first_line(error)}"
            if self._healing_since is not None or self._num_failed_probes == MAX_FAILED_PROBES:
                raise ServeError(problem)
            self._tell(f"{problem} ({self._num_failed_probes} of {MAX_FAILED_PROBES})")

    def _ask(self) -> Future[list[Picture]]:
        # A server that has just been started may have to warm up first.
        timeout = self._patience.probe_timeout_s
        if self._healing_since is not None:
            timeout = max(timeout, self._server.start_timeout_s)
        return in_background(lambda: self._server.make_probe_pictures(timeout))

    def _reload(self, model: str) -> None:
        self._begin_heal()
        self._num_reloads += 1
        if self._num_reloads > MAX_HEALS:
            raise ServeError(f"{model} died again after {MAX_HEALS} reloads")
        self._tell(f"{model} died; reloading it")
        self._server.reload(model)

    def _restart(self, why: str) -> None:
        """Start the server anew, until it works.

        Raises:
            ServeInterrupted: it is to stop.
            ServeError: it was restarted too often.
        """
        while True:
            self._begin_heal()
            if self._num_restarts == MAX_HEALS:
                raise self._server.failure(
                    f"{why}; giving up after {MAX_HEALS} restarts "
                    f"with less than {self._patience.healthy_s:g} s of health after each"
                )
            self._num_restarts += 1
            self._num_reloads = 0
            self._known_dead.clear()
            self._tell(f"{why}; restarting the server")
            try:
                self._server.restart()
            except ServeInterrupted:
                raise
            except ServeError as error:
                why = _first_line(error)
            else:
                return

    def _begin_heal(self) -> None:
        now = time.monotonic()
        if self._healing_since is None:
            self._healing_since = now
            if now - self._healthy_since >= self._patience.healthy_s:
                self._num_reloads = self._num_restarts = 0
        # One that is on its way says nothing about what comes now.
        self._probe = None
        self._next_probe_at = now
        self._num_failed_probes = 0

    def _heal_is_over(self) -> None:
        if self._healing_since is None:
            return
        now = time.monotonic()
        self._tell(f"healed in {now - self._healing_since:.1f} s")
        self._healing_since = None
        self._healthy_since = now


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]
