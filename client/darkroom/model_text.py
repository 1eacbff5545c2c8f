"""What is known of a model, for people to read."""

import textwrap
from collections.abc import Iterable

from darkroom.model_info import ModelInfo

_INDENT = 18
_WIDTH = 88


def model_text(info: ModelInfo) -> str:
    """A paragraph."""
    limits = (f"{name} {limit}" for name, limit in sorted(info.limits.items()))
    facts = {
        "checkpoint": [info.name, info.family],
        "engine": [info.engine],
        # Older servers do not say.
        "backends": info.raw.get("backends", ["unknown"]),
        "modes": info.modes,
        "samplers": info.samplers,
        "limits": limits,
        "controlnets": info.controlnets,
        "loras": info.loras,
        "variants": info.variants,
        "safety checker": [info.safety_checker],
    }
    return "\n".join([info.model, *(_line(name, values) for name, values in facts.items())])


def _line(name: str, values: Iterable[str]) -> str:
    return textwrap.fill(
        ", ".join(values) or "none",
        width=_WIDTH,
        initial_indent=f"  {name}".ljust(_INDENT),
        subsequent_indent=" " * _INDENT,
        break_long_words=False,
        break_on_hyphens=False,
    )
