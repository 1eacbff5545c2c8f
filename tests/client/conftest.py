"""A fake Triton, fresh for each test."""

from collections.abc import Iterator

import pytest
from fake_triton import FakeTriton


@pytest.fixture
def triton() -> Iterator[FakeTriton]:
    with FakeTriton() as triton:
        yield triton
