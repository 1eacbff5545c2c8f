"""The fields that have a value for each ControlNet, or for each adapter, that a request names."""

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

from darkroom.exceptions import InvalidRequest

_FIELDS = {
    "controlnet": (
        "control_image",
        "controlnet_conditioning_scale",
        "control_guidance_start",
        "control_guidance_end",
    ),
    "lora": ("lora_scale",),
}
_NEEDED = "control_image"


def with_lists(chosen: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a request, these as lists of equal length; without those of no names.

    Raises:
        InvalidRequest: there are more or fewer values than names.
    """
    lists = _with_scales(chosen)
    for field, others in _FIELDS.items():
        names = as_list(lists.pop(field, []))
        if names:
            lists[field] = names
        for other in others:
            values = _values(field, other, names, lists.pop(other, []))
            if values:
                lists[other] = values
    return lists


def as_list(value: Any) -> list[Any]:
    """The values, of which one alone needs no list."""
    is_list = isinstance(value, Sequence) and not isinstance(value, str | bytes)
    return list(value) if is_list else [value]


def _with_scales(chosen: Mapping[str, Any]) -> dict[str, Any]:
    fields = dict(chosen)
    lora = fields.get("lora")
    if isinstance(lora, Mapping):
        if "lora_scale" in fields:
            raise InvalidRequest("lora_scale: given twice, lora maps its names to scales already")
        fields["lora"] = list(lora)
        fields["lora_scale"] = list(lora.values())
    return fields


def _values(field: str, other: str, names: list[Any], value: Any) -> list[Any]:
    values = as_list(value)
    if values and not names:
        raise InvalidRequest(f"{other}: needs the names that it belongs to, {field}")
    if isinstance(value, Real):
        # Of all of them, as in diffusers.
        return values * len(names)
    is_given = bool(values) or other == _NEEDED
    if is_given and len(values) != len(names):
        raise InvalidRequest(
            f"{other}: {len(values)} given, allowed is one for each name of {field}: {len(names)}"
        )
    return values
