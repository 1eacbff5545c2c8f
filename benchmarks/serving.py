"""A server to be measured, whose failure is told with the end of its log."""

import contextlib
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from darkroom import DarkroomError
from darkroom.progress import terminal_progress
from darkroom.server import ServeError, Server, free_ports

REQUEST_TIMEOUT_S = 120.0
"""More than any request takes: a server that no longer answers must end the benchmark."""
LOG_LINES = 15
LOOK_AGAIN_S = 0.2


@contextlib.contextmanager
def serving(
    repository: Path, engine_parameters: Mapping[str, str] | None = None
) -> Iterator[Server]:
    """A server on free ports of the loopback, with these settings of the engine.

    Raises:
        ServeError: it cannot be started, or what was measured failed.
    """
    server = Server(
        repository, free_ports(), terminal_progress, engine_parameters=engine_parameters
    )
    with server:
        # Now they tell their names, which the dead do not.
        server.dead_stubs()
        try:
            yield server
        except DarkroomError as error:
            raise ServeError(
                "\n".join(
                    [
                        f"{type(error).__name__}: {error}",
                        *(f"{model} died" for model in _dead_models(server)),
                        "The end of the server's log:",
                        *server.log.read_text(errors="replace").splitlines()[-LOG_LINES:],
                    ]
                )
            ) from error


def _dead_models(server: Server) -> list[str]:
    # A process counts as dead when it was so at two looks.
    server.dead_stubs()
    time.sleep(LOOK_AGAIN_S)
    return list(server.dead_stubs().values())
