"""The engine's second door: a Unix socket for the models beside it, see `darkroom_wire`."""

import contextlib
import logging
import secrets
import socket
import threading
import time
from multiprocessing.connection import Connection
from typing import Any

import darkroom_wire as wire
from darkroom_engine.errors import EngineError
from darkroom_engine.intake import Intake
from darkroom_engine.job import JobResult

BACKLOG = 128
RETRY_S = 0.1

logger = logging.getLogger(__name__)


class Door:
    """Takes requests from the socket; a connection is one request, and its end cancels it.

    A new engine may open its door before the old one's is closed, when Triton reloads the model:
    the newer takes the place of the older, and the older leaves that place alone.
    """

    def __init__(self, engine: Intake, model: str) -> None:
        """Make the socket of that model, which takes its place when it is started.

        Raises:
            OSError: the socket cannot be made where it has to be.
        """
        self._engine = engine
        wire.make_runtime_dir()
        self._path = wire.socket_path(model)
        own_path = self._path.with_name(f"{model}-{secrets.token_hex(4)}.sock")
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            self._socket.bind(str(own_path))
        except OSError as error:
            self._socket.close()
            raise OSError(
                f"{own_path}: {error}; {wire.RUNTIME_DIR} names another folder, of a short path"
            ) from None
        self._socket.listen(BACKLOG)
        self._inode = own_path.stat().st_ino
        self._own_path = own_path
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="door", daemon=True)

    def start(self) -> None:
        self._own_path.replace(self._path)
        self._thread.start()

    def close(self) -> None:
        """Take no more connections; those that are open go on."""
        if self._is_closing:
            return
        self._is_closing = True
        # This wakes whoever accepts.
        self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._socket.close()
        with contextlib.suppress(FileNotFoundError):
            if self._path.stat().st_ino == self._inode:
                self._path.unlink()

    def _run(self) -> None:
        while not self._is_closing:
            try:
                accepted, _ = self._socket.accept()
            except OSError as error:
                if not self._is_closing:
                    # Out of file descriptors, say: those that are open will be closed some time.
                    logger.warning("a connection to the engine's socket failed: %s", error)
                    time.sleep(RETRY_S)
                continue
            connection = Connection(accepted.detach())
            visitor = Visitor(self._engine, connection)
            try:
                threading.Thread(target=visitor.serve, name="visitor", daemon=True).start()
            except RuntimeError as error:  # no more threads
                logger.warning("a connection to the engine's socket was refused: %s", error)
                connection.close()


class Visitor:
    """One connection: reads the request on a thread of its own, then waits for the other's end."""

    def __init__(self, engine: Intake, connection: Connection) -> None:
        self._engine = engine
        self._connection = connection
        # Sending and closing exclude each other: a closed connection's number may be another's.
        self._lock = threading.Lock()
        self._has_left = False
        self.preview_interval = 0

    def serve(self) -> None:
        try:
            header, blobs = wire.receive(self._connection)
            if header["op"] == "cancel":
                self._cancel(header["request_id"])
            else:
                self._ask(header, blobs)
            # Nothing more comes but the end, after the answer or before it.
            wire.receive(self._connection)
        except (EOFError, OSError):
            pass
        except Exception:
            logger.exception("this is a bug")
        finally:
            with self._lock:
                self._has_left = True
                self._connection.close()

    def on_event(self, event: dict[str, Any], preview: bytes | None) -> None:
        self._send({"event": event}, [] if preview is None else [preview])

    def _ask(self, header: wire.Header, blobs: list[bytes]) -> None:
        self.preview_interval = header["preview_interval"]
        self._engine.ask(
            wire.unpack_fields(header, blobs),
            self._reply,
            request_id=header["request_id"],
            is_abandoned=lambda: self._has_left,
            listener=self,
        )

    def _cancel(self, request_id: str) -> None:
        try:
            self._send({"cancelled": self._engine.cancel(request_id)})
        except EngineError as error:
            self._reply(error)

    def _reply(self, answer: JobResult | EngineError) -> None:
        if isinstance(answer, EngineError):
            self._send({"error": str(answer), "code": answer.code})
        else:
            end = {"event": {"type": "done"}, "seeds": answer.seeds, "info": answer.info}
            self._send(end, answer.pictures)

    def _send(self, header: wire.Header, blobs: list[bytes] | None = None) -> None:
        # That the other has left is noticed where this connection is read.
        with self._lock, contextlib.suppress(OSError):
            if not self._has_left:
                wire.send(self._connection, header, blobs)
