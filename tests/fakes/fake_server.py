"""A server that dies and recovers as a test says, for the supervisor to watch."""

from collections.abc import Callable, Iterator

from darkroom.exceptions import DarkroomError
from darkroom.server import ServeError, ServeInterrupted

MAX_LOOKS = 20_000


class FakeServer:
    """Has of `darkroom.server.Server` what the supervisor uses.

    A test's script is a generator: it goes on to its next `yield` at each look of the supervisor,
    and when it returns, the server is told to stop.
    """

    start_timeout_s = 600.0
    reloadable = ("darkroom", "text_encoder", "unet", "vae_decoder")

    def __init__(self, script: Callable[["FakeServer"], Iterator[None]]) -> None:
        self._script = script(self)
        self._dead: dict[int, str] = {}
        self.told: list[str] = []
        self.calls: list[str] = []
        self.end: str | None = None
        """How the server process ended, if it did."""
        self.probe_failure: DarkroomError | None = None
        self.probe_timeouts: list[float] = []
        """What each probe so far was given."""
        self.reload_failure: ServeError | None = None
        self.restart_failure: ServeError | None = None

    def kill(self, *models: str) -> None:
        for model in models:
            self._dead[len(self._dead)] = model

    def until_told(self, word: str, times: int = 1) -> Iterator[None]:
        for _ in range(MAX_LOOKS):
            if sum(word in line for line in self.told) >= times:
                return
            yield
        raise AssertionError(f"{word!r} was not told: {self.told}")

    def until_probed(self, times: int) -> Iterator[None]:
        """Until so many more probes were asked for."""
        goal = len(self.probe_timeouts) + times
        for _ in range(MAX_LOOKS):
            if len(self.probe_timeouts) >= goal:
                return
            yield
        raise AssertionError("no probe")

    def check(self) -> None:
        if next(self._script, self) is self:
            raise ServeInterrupted("interrupted")
        if self.end:
            raise self.failure(f"tritonserver {self.end}")

    def dead_stubs(self) -> dict[int, str]:
        return dict(self._dead)

    def make_probe_pictures(self, timeout: float) -> None:
        self.probe_timeouts.append(timeout)
        if self.probe_failure:
            raise self.probe_failure

    def reload(self, model: str) -> None:
        self.calls.append(f"reload {model}")
        if self.reload_failure:
            raise self.reload_failure

    def restart(self) -> None:
        self.calls.append("restart")
        if self.restart_failure:
            raise self.restart_failure
        self.end = None
        self._dead.clear()

    def failure(self, what: str) -> ServeError:
        return ServeError(f"{what}\nE1124 the log's last error")
