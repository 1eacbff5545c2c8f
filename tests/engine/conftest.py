"""The fixtures of an engine over fake networks."""

from engine_harness import (  # noqa: F401  fixtures are found by name
    harness,
    make_engine,
    manifest,
    manifest_document,
    networks,
    repository,
)
