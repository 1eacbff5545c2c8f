"""How much is measured: on a GPU with models of full size, or on any machine with small ones."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Scale:
    """The sizes and counts of all parts. Times are in seconds."""

    checkpoints: Mapping[str, str]
    """By model: an architecture to be made with random weights, or a folder of the checkout."""
    max_rows: Mapping[str, int]
    """Rows of a step of our engine, by model."""
    rows: tuple[int, ...]
    """Numbers of rows whose steps are measured."""
    num_steps: int
    """Of the requests that are measured one by one, and of those that keep the engine full."""
    mixed_steps: tuple[int, int]
    """Step counts of mixed requests, from low to high."""
    num_pairs: int
    """Pairs of runs, of which the median of the ratios is taken."""
    num_calls: int
    """Calls of a network that are timed."""
    num_compared: int
    """Pictures that are compared with others'."""
    num_joins: int
    full_s: float
    """For which the engine is kept full."""
    load_s: float
    """At the most, during which requests of one load arrive."""
    shares: tuple[float, ...]
    """Loads, as shares of the capacity."""
    matmul_size: int
    copied_bytes: int


FULL = Scale(
    checkpoints={"sd15": "sd15", "sdxl": "sdxl"},
    max_rows={"sd15": 32, "sdxl": 16},
    rows=(1, 2, 4, 8, 16, 32),
    num_steps=25,
    mixed_steps=(10, 50),
    num_pairs=5,
    num_calls=20,
    num_compared=4,
    num_joins=10,
    full_s=20.0,
    load_s=60.0,
    shares=(0.5, 0.75, 0.9),
    matmul_size=8192,
    copied_bytes=4 * 2**30,
)
SMALL = Scale(
    checkpoints={"sd15": "shapes/checkpoint", "sdxl": "tiny-sdxl"},
    max_rows={"sd15": 8, "sdxl": 8},
    rows=(1, 2, 4),
    num_steps=6,
    mixed_steps=(2, 10),
    num_pairs=2,
    num_calls=3,
    num_compared=2,
    num_joins=3,
    full_s=3.0,
    load_s=4.0,
    shares=(0.5, 0.9),
    matmul_size=1024,
    copied_bytes=64 * 2**20,
)
