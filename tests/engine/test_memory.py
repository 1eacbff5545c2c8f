"""How many rows fit into memory."""

from collections.abc import Callable
from pathlib import Path

import pytest
from engine_harness import Harness

from darkroom_engine.memory import MemoryMeter, available_bytes, rows_that_fit

MB = 10**6


def meminfo(directory: Path, available_kb: int) -> Path:
    path = directory / "meminfo"
    path.write_text(f"MemTotal:  999 kB\nMemAvailable:    {available_kb} kB\nBuffers: 1 kB\n")
    return path


def test_without_a_container_it_is_what_the_host_has(tmp_path: Path) -> None:
    assert available_bytes(meminfo(tmp_path, 5), tmp_path / "none") == 5 * 1024


@pytest.mark.parametrize(("limit", "expected"), [("max", 5000 * 1024), ("2000000", 1_300_000)])
def test_within_a_container_it_is_what_its_limit_leaves(
    tmp_path: Path, limit: str, expected: int
) -> None:
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    (tmp_path / "memory.current").write_text("1000000\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 300000\n")

    assert available_bytes(meminfo(tmp_path, 5000), tmp_path) == expected


def test_the_machine_that_runs_this_has_some() -> None:
    assert available_bytes() > 0


class Machine:
    """A machine whose network takes `row_bytes` a row, and may keep them for the next call."""

    def __init__(self, total: int, row_bytes: int, *, keeps: bool) -> None:
        self.free = total
        self.row_bytes = row_bytes
        self.keeps = keeps
        self.kept = 0
        self.calls: list[int] = []

    def available(self) -> int:
        return self.free

    def denoise(self, num_rows: int) -> None:
        self.calls.append(num_rows)
        needed = max(0, num_rows * self.row_bytes - self.kept)
        self.free -= needed
        # The meter looks now and then; a call is longer than that.
        MemoryMeter(self.available).__enter__().__exit__()
        import time

        time.sleep(0.05)
        if self.keeps:
            self.kept += needed
        else:
            self.free += needed


@pytest.mark.parametrize("keeps", [True, False])
@pytest.mark.parametrize(
    ("total", "expected"), [(1000 * MB, 8), (10_000 * MB, 63), (150 * MB, 2), (625 * MB, 5)]
)
def test_rows_are_those_that_fit_into_most_of_what_is_free(
    total: int, expected: int, *, keeps: bool
) -> None:
    machine = Machine(total, 100 * MB, keeps=keeps)

    assert rows_that_fit(machine.denoise, 63, machine.available) == expected
    assert machine.calls == [1, 2]


def test_an_engine_finds_its_rows_by_itself(make_engine: Callable[..., Harness]) -> None:
    harness = make_engine(max_rows=None)
    harness.picture()

    # Formulas take next to no memory.
    assert harness.engine.max_rows((4, 8, 8)) > 16


def test_larger_pictures_have_fewer_rows_but_a_guided_one_always_runs(
    make_engine: Callable[..., Harness],
) -> None:
    engine = make_engine(max_rows=8).engine

    shapes = [(4, 4, 4), (4, 8, 8), (4, 16, 8), (4, 16, 16), (4, 64, 64)]
    assert [engine.max_rows(shape) for shape in shapes] == [8, 8, 4, 2, 2]
