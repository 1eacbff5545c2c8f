"""What a server tells of a model that it serves."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self


@dataclass(frozen=True)
class ModelInfo:
    """A model, and what may be asked of it."""

    model: str
    """What `Client` takes as its `model`."""
    name: str
    """The checkpoint's."""
    family: str
    """"sd1", "sd2", "sdxl", "sdxl-refiner" or "sd3"."""
    engine: str
    """A hash that changes with the checkpoint and its export."""
    modes: tuple[str, ...]
    """Out of "text2img", "img2img" and "inpaint"."""
    samplers: tuple[str, ...]
    limits: Mapping[str, Any]
    """The least, the most and the default of fields, by name."""
    controlnets: tuple[str, ...]
    loras: tuple[str, ...]
    """The adapters that a request may mix."""
    variants: tuple[str, ...]
    safety_checker: str
    """"off", "flag" if pictures tell what it found, or "blank" if it blacks them out besides."""
    raw: Mapping[str, Any] = field(repr=False)
    """All that the server said, also what this version of the client does not know."""

    @classmethod
    def from_raw(cls, raw: Mapping[str, Any]) -> Self:
        """Read what the server said.

        Raises:
            LookupError: something is missing.
            TypeError: something is of another type.
        """
        return cls(
            model=_typed(raw, "model", str),
            name=_typed(raw, "name", str),
            family=_typed(raw, "family", str),
            engine=_typed(raw, "engine", str),
            modes=_names(raw, "modes"),
            samplers=_names(raw, "samplers"),
            limits=_typed(raw, "limits", dict),
            controlnets=_names(raw, "controlnets"),
            loras=_names(raw, "loras"),
            variants=_names(raw, "variants"),
            safety_checker=_typed(raw, "safety_checker", str),
            raw=raw,
        )


def _typed(raw: Mapping[str, Any], name: str, kind: type) -> Any:
    value = raw[name]
    if not isinstance(value, kind):
        raise TypeError(f"{name} {value!r}")
    return value


def _names(raw: Mapping[str, Any], name: str) -> tuple[str, ...]:
    # A mapping of names to what is known of them will do.
    value = raw[name]
    if not isinstance(value, list | dict) or not all(isinstance(it, str) for it in value):
        raise TypeError(f"{name} {value!r}")
    return tuple(value)
