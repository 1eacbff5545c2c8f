"""Which checkpoint the server tests serve, and where it is exported to."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
CHECKPOINT = str(ROOT / "shapes" / "checkpoint")
REPOSITORY = ROOT / "build" / "shapes"
