"""How the models of one server talk with each other: messages over Unix sockets.

Of the models that clients see, only `stable_diffusion` holds the engine. Its other faces reach it
through a socket, which has what Triton's own calls between models lack: many messages for one
request, and an end that is noticed at once when either process dies. Through another one, the
engines of a server tell their metrics to the model `darkroom`. The sockets lie in a folder that
only this user may enter; nothing that comes over the network names it.

A message is a JSON object and some blobs of bytes. An export copies this file into every model that
uses it.
"""

from __future__ import annotations

import json
import os
import tempfile
from itertools import islice
from multiprocessing.connection import Client, Connection
from pathlib import Path
from typing import Any

RUNTIME_DIR = "DARKROOM_RUNTIME_DIR"
"""The environment variable that names the sockets' folder, one for each server."""

Header = dict[str, Any]
Scalar = bytes | int | float
Fields = dict[str, Scalar | tuple[Scalar, ...]]

_DESCRIPTION = ".json"


def runtime_dir() -> Path:
    """The folder of this server's sockets, the same for all its models.

    All of them are children of one tritonserver, whose id tells servers apart.
    """
    named = os.environ.get(RUNTIME_DIR)
    return Path(named or Path(tempfile.gettempdir()) / f"darkroom-{os.getppid()}-runtime")


def socket_path(model: str) -> Path:
    """Where the engine of a model listens."""
    return runtime_dir() / f"{model}.sock"


def metrics_path() -> Path:
    """Where metrics are taken, by the model that publishes them."""
    return runtime_dir() / "metrics"


def description_path(model: str) -> Path:
    """Where the engine of a model says what may be asked of it, while it is there."""
    return runtime_dir() / f"{model}{_DESCRIPTION}"


def description_paths() -> dict[str, Path]:
    """The descriptions that are there, by the names of their models."""
    paths = runtime_dir().glob(f"*{_DESCRIPTION}")
    return {path.name.removesuffix(_DESCRIPTION): path for path in sorted(paths)}


def make_runtime_dir() -> None:
    """Make the folder, for this user alone.

    Raises:
        PermissionError: it is there and somebody else's.
    """
    directory = runtime_dir()
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    owner = directory.stat()
    if owner.st_uid != os.getuid() or owner.st_mode & 0o077:
        raise PermissionError(f"{directory}: open to others, no socket can lie there")


def connect(path: Path) -> Connection:
    """Connect to whoever listens there.

    Raises:
        OSError: nobody does.
    """
    return Client(str(path), family="AF_UNIX")


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
    numbers: Header = {}
    texts: list[tuple[str, int | None]] = []
    blobs: list[bytes] = []
    for name, value in fields.items():
        several = value if isinstance(value, tuple) else (value,)
        own = [it for it in several if isinstance(it, bytes)]
        if own:
            texts.append((name, len(own) if isinstance(value, tuple) else None))
            blobs += own
        else:
            numbers[name] = value
    return {"numbers": numbers, "texts": texts}, blobs


def unpack_fields(header: Header, blobs: list[bytes]) -> Fields:
    fields: Fields = {
        # JSON has lists for tuples.
        name: tuple(value) if isinstance(value, list) else value
        for name, value in header["numbers"].items()
    }
    rest = iter(blobs)
    for name, count in header["texts"]:
        fields[name] = next(rest) if count is None else tuple(islice(rest, count))
    return fields
