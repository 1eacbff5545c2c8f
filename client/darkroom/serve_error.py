"""Why a server of one's own does not serve."""

from darkroom.exceptions import DarkroomError


class ServeError(DarkroomError):
    """The server cannot be started, or died; the text says why and what to do."""


class ServeInterrupted(ServeError):
    """The server was told to stop before it was ready."""
