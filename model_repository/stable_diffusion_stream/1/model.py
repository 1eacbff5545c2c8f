"""Triton's streaming face of the engine: passes requests to it, and its events to the clients."""

# The stub adds to pb_utils after this file is imported, so that annotations must wait.
from __future__ import annotations

import base64
import json
import logging
import multiprocessing.connection
import queue
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection

import numpy as np
import triton_python_backend_utils as pb_utils

import darkroom_stub as stub
import darkroom_wire as wire

POLL_S = 0.02
MAX_SHARE = 0.1
"""Of the time, that asking for cancelled requests may take; each question is a round trip."""

logger = logging.getLogger(__name__)


class TritonPythonModel:
    """One request in, many responses out; `execute` never waits."""

    def initialize(self, args: dict[str, str]) -> None:
        self._shapes = stub.input_shapes(json.loads(args["model_config"]))
        self._engine = wire.socket_path(args["model_name"].removesuffix("_stream"))
        self._relay = Relay()
        self._is_finalized = stub.end_with_server()
        self._relay.start()

    def execute(self, requests: list) -> None:
        for request in requests:
            sender = request.get_response_sender()
            try:
                self._relay.add(self._open(request, sender))
            except stub.MalformedField as error:
                _send_error(sender, f"{error.field}: {error}", "INVALID_ARG")
            except OSError as error:
                _send_error(sender, f"the engine is not running: {error}", "UNAVAILABLE")

    def finalize(self) -> None:
        self._relay.close()
        self._is_finalized.set()

    def _open(
        self, request: pb_utils.InferenceRequest, sender: pb_utils.InferenceResponseSender
    ) -> Stream:
        request_id = stub.read_request_id(request)
        fields = stub.read_fields(pb_utils, request, self._shapes)
        preview_interval = fields.pop("preview_interval", 0)
        if preview_interval < 0:
            raise stub.MalformedField(
                "preview_interval", f"{preview_interval} is out of range, allowed are 0 and more"
            )
        header, blobs = wire.pack_fields(fields)
        header |= {
            "op": "generate",
            "request_id": request_id,
            "preview_interval": preview_interval,
        }
        connection = wire.connect(self._engine)
        wire.send(connection, header, blobs)
        return Stream(connection, sender, is_json=fields.get("output_format") == b"b64_png")


class Stream:
    """One request on its way: the engine's connection on one side, the client on the other."""

    def __init__(
        self, connection: Connection, sender: pb_utils.InferenceResponseSender, *, is_json: bool
    ) -> None:
        self.connection = connection
        self._sender = sender
        self._is_json = is_json

    @property
    def is_cancelled(self) -> bool:
        """Whether the client has left; not to be asked of an answered request, as that crashes."""
        return bool(self._sender.is_cancelled())

    def pass_on(self) -> bool:
        """Pass on one message; False when that was the last one."""
        try:
            header, blobs = wire.receive(self.connection)
        except (EOFError, OSError):
            self.fail("the engine stopped before the picture was done", "UNAVAILABLE")
            return False
        if "error" in header:
            self.fail(header["error"], header["code"])
            return False
        event = header["event"]
        tensors = [_bytes_tensor("event", [json.dumps(event).encode()])]
        is_last = event["type"] == "done"
        if is_last:
            tensors += [
                _bytes_tensor("image", blobs),
                pb_utils.Tensor("seed", np.array(header["seeds"], np.int64)),
                _bytes_tensor("info", [json.dumps(header["info"]).encode()]),
            ]
        elif blobs:
            preview = base64.b64encode(blobs[0]) if self._is_json else blobs[0]
            tensors.append(_bytes_tensor("preview", [preview]))
        flags = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if is_last else 0
        self._sender.send(pb_utils.InferenceResponse(tensors), flags=flags)
        return not is_last

    def fail(self, message: str, code: str) -> None:
        """Answer with an error, which is the last message."""
        _send_error(self._sender, message, code)


class Relay:
    """All open streams, on one thread: a request is answered and asked about by it alone."""

    def __init__(self) -> None:
        self._arrived: queue.SimpleQueue[Stream | None] = queue.SimpleQueue()
        # Written to when there is something in the queue, because the thread waits for connections.
        self._bell, self._doorbell = multiprocessing.connection.Pipe(duplex=False)
        self._streams: dict[Connection, Stream] = {}
        self._thread = threading.Thread(target=self._run, name="relay", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def add(self, stream: Stream | None) -> None:
        self._arrived.put(stream)
        self._doorbell.send_bytes(b"1")

    def close(self) -> None:
        """End what is open with an error, and stop."""
        self.add(None)
        self._thread.join()

    def _run(self) -> None:
        ask_at = 0.0
        while True:
            timeout = max(0.0, ask_at - time.monotonic()) if self._streams else None
            ready = multiprocessing.connection.wait([self._bell, *self._streams], timeout)
            for connection in ready:
                if connection is self._bell:
                    self._bell.recv_bytes()
                    stream = self._arrived.get()
                    if stream is None:
                        self._end_all()
                        return
                    self._streams[stream.connection] = stream
                else:
                    self._pass_on(self._streams[connection])
            if self._streams and time.monotonic() >= ask_at:
                start = time.monotonic()
                self._drop_cancelled()
                now = time.monotonic()
                ask_at = now + max(POLL_S, (now - start) / MAX_SHARE)

    def _pass_on(self, stream: Stream) -> None:
        with self._dropped_on_error(stream):
            if not stream.pass_on():
                self._drop(stream)

    def _drop_cancelled(self) -> None:
        for stream in list(self._streams.values()):
            with self._dropped_on_error(stream):
                if stream.is_cancelled:
                    stream.fail("the request was cancelled", "CANCELLED")
                    self._drop(stream)

    def _end_all(self) -> None:
        for stream in list(self._streams.values()):
            with self._dropped_on_error(stream):
                stream.fail("the server is stopping", "UNAVAILABLE")
                self._drop(stream)

    @contextmanager
    def _dropped_on_error(self, stream: Stream) -> Iterator[None]:
        """One stream that cannot be served must not take down the thread that all depend on."""
        try:
            yield
        except Exception:
            logger.exception("a stream could not be served")
            with suppress(Exception):
                stream.fail("the stream could not be served, see the server's log", "INTERNAL")
            self._drop(stream)

    def _drop(self, stream: Stream) -> None:
        """Forget a stream; the engine takes the end of its connection for a cancel."""
        if self._streams.pop(stream.connection, None):
            stream.connection.close()


def _bytes_tensor(name: str, values: list[bytes]) -> pb_utils.Tensor:
    return pb_utils.Tensor(name, np.array(values, dtype=object))


def _send_error(sender: pb_utils.InferenceResponseSender, message: str, code: str) -> None:
    error = pb_utils.TritonError(message, getattr(pb_utils.TritonError, code))
    sender.send(
        pb_utils.InferenceResponse(error=error),
        flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL,
    )
