"""How the models of one server talk with the engine: messages over a Unix socket.

Of the models that clients see, only `stable_diffusion` holds the engine. The others reach it
through this socket, which has what Triton's own calls between models lack: many messages for one
request, and an end that is noticed at once when either process dies. The socket lies in a folder
that only this user may enter; nothing that comes over the network names it.

A message is a JSON object and some blobs of bytes. An export copies this file into every model that
uses it.
"""

from __future__ import annotations

import json
import os
import tempfile
from multiprocessing.connection import Client, Connection
from pathlib import Path
from typing import Any

RUNTIME_DIR = "DARKROOM_RUNTIME_DIR"
"""The environment variable that names the socket's folder, one for each server."""

Header = dict[str, Any]
Fields = dict[str, bytes | int | float]


def runtime_dir() -> Path:
    """The folder of this server's sockets, the same for all its models.

    All of them are children of one tritonserver, whose id tells servers apart.
    """
    named = os.environ.get(RUNTIME_DIR)
    return Path(named or Path(tempfile.gettempdir()) / f"darkroom-{os.getppid()}-runtime")


def socket_path() -> Path:
    return runtime_dir() / "engine.sock"


def make_runtime_dir() -> None:
    """Make the folder, for this user alone.

    Raises:
        PermissionError: it is there and somebody else's.
    """
    directory = runtime_dir()
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    owner = directory.stat()
    if owner.st_uid != os.getuid() or owner.st_mode & 0o077:
        raise PermissionError(f"{directory}: open to others, the engine's socket cannot lie there")


def connect() -> Connection:
    """Connect to the engine.

    Raises:
        OSError: it is not running.
    """
    return Client(str(socket_path()), family="AF_UNIX")


def send(connection: Connection, header: Header, blobs: list[bytes] | None = None) -> None:
    """Send one message; only one thread at a time may.

    Raises:
        OSError: the other side is gone.
    """
    blobs = blobs or []
    connection.send_bytes(json.dumps({**header, "num_blobs": len(blobs)}).encode())
    for blob in blobs:
        connection.send_bytes(blob)


def receive(connection: Connection) -> tuple[Header, list[bytes]]:
    """Wait for one message.

    Raises:
        EOFError, OSError: the other side is gone.
    """
    header = json.loads(connection.recv_bytes())
    return header, [connection.recv_bytes() for _ in range(header.pop("num_blobs"))]


def pack_fields(fields: Fields) -> tuple[Header, list[bytes]]:
    """Fields of a request as a header and blobs, see `unpack_fields`."""
    texts = {name: value for name, value in fields.items() if isinstance(value, bytes)}
    numbers = {name: value for name, value in fields.items() if name not in texts}
    return {"numbers": numbers, "texts": list(texts)}, list(texts.values())


def unpack_fields(header: Header, blobs: list[bytes]) -> Fields:
    return {**header["numbers"], **dict(zip(header["texts"], blobs, strict=True))}
