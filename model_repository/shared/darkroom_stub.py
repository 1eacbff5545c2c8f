"""What every process of a model needs that has no knowledge of diffusion.

An export copies this file into every model that clients see.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from typing import Any

Scalar = bytes | int | float
Fields = dict[str, Scalar | tuple[Scalar, ...]]
Shapes = dict[str, list[int]]
"""The dimensions of inputs by name; -1 is any."""

MAX_BYTES = 64 * 2**20
"""Of one text or picture; nothing that is asked for needs that much."""
PARENT_POLL_S = 1.0
_PARENT = os.getppid()


class MalformedField(ValueError):
    """Something of a request that cannot be read; `field` is its name."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(problem)
        self.field = field


def input_shapes(config: Mapping[str, Any]) -> Shapes:
    """The dimensions of a model's inputs, as Triton tells them to `initialize`."""
    return {entry["name"]: [int(size) for size in entry["dims"]] for entry in config["input"]}


def read_fields(pb_utils: Any, request: Any, shapes: Shapes) -> Fields:
    """The inputs of a Triton request, without those left out.

    One of shape [1] is its value, one of any other shape a tuple of its values.

    Raises:
        MalformedField: an input has another shape than it may have, or too many bytes.
    """
    fields: Fields = {}
    for name, shape in shapes.items():
        tensor = pb_utils.get_input_tensor_by_name(request, name)
        if tensor is None:
            continue
        values = tensor.as_numpy()
        sizes = list(values.shape)
        if len(sizes) != len(shape) or any(
            size != allowed for size, allowed in zip(sizes, shape, strict=True) if allowed >= 0
        ):
            raise MalformedField(name, f"shape {sizes} is not {shape}")
        listed = values.ravel().tolist()
        for value in listed:
            if isinstance(value, bytes) and len(value) > MAX_BYTES:
                raise MalformedField(
                    name, f"{len(value)} bytes is too long, allowed are 0 to {MAX_BYTES}"
                )
        fields[name] = listed[0] if shape == [1] else tuple(listed)
    return fields


def read_request_id(request: Any) -> str:
    """The id of a Triton request, empty if it has none.

    Raises:
        MalformedField: it is no text.
    """
    try:
        return str(request.request_id())
    except UnicodeDecodeError:
        raise MalformedField("id", "not UTF-8 text") from None


def is_server_gone() -> bool:
    """Whether the server's process has ended; to call it then may hang for ever."""
    return os.getppid() != _PARENT


def end_with_server() -> threading.Event:
    """End this process when the server's is gone, until the returned event is set.

    The stub looks for that itself, but then waits for a lock that a call to the dead server holds.
    """
    is_over = threading.Event()

    def watch() -> None:
        while not is_over.wait(PARENT_POLL_S):
            if is_server_gone():
                os._exit(1)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()
    return is_over
