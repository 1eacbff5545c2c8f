"""A real tritonserver on the embedded checkpoint, shared by all tests of this folder."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from server_checkpoint import CHECKPOINT, REPOSITORY

from darkroom import Client
from darkroom.server import Server, free_ports


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.server)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The exported embedded checkpoint; `make demo` makes and uses the same one."""
    from darkroom_export import export_checkpoint

    export_checkpoint(CHECKPOINT, REPOSITORY)
    return REPOSITORY


@pytest.fixture(scope="session")
def server(repository: Path) -> Iterator[Server]:
    with Server(repository, free_ports()) as server:
        yield server


@pytest.fixture(scope="session")
def client(server: Server) -> Iterator[Client]:
    with Client(server.grpc_url, timeout=120) as client:
        yield client
