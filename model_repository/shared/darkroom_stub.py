"""What every process of a model needs that has no knowledge of diffusion.

An export copies this file into every model that clients see.
"""

from __future__ import annotations

import os
import threading
from typing import Any

Fields = dict[str, bytes | int | float]

PARENT_POLL_S = 1.0
_PARENT = os.getppid()


class MalformedField(ValueError):
    """Something of a request that cannot be read; `field` is its name."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(problem)
        self.field = field


def read_fields(pb_utils: Any, request: Any, names: list[str]) -> Fields:
    """The inputs of a Triton request, each of one value, without those left out.

    Raises:
        MalformedField: an input has another shape than [1].
    """
    fields = {}
    for name in names:
        tensor = pb_utils.get_input_tensor_by_name(request, name)
        if tensor is None:
            continue
        values = tensor.as_numpy()
        if values.size != 1:
            raise MalformedField(name, f"shape {list(values.shape)} is not [1]")
        fields[name] = values.item()
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
