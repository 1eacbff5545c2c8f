"""Where a server listens."""

import socket
from collections.abc import Iterable
from dataclasses import dataclass

from darkroom.serve_error import ServeError


@dataclass(frozen=True)
class Ports:
    """Where the server listens."""

    host: str = "127.0.0.1"
    http: int = 8000
    grpc: int = 8001
    metrics: int = 8002


def check_ports(ports: Ports) -> None:
    """Refuse ports that cannot be listened on.

    Raises:
        ServeError: names the port and the option that chooses another.
    """
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
