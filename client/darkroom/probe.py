"""The smallest picture a server makes: only that shows that all of it works."""

import re
import time

from darkroom.client import Client
from darkroom.exceptions import InvalidRequest
from darkroom.picture import Picture

PRIORITY = 10
"""The highest: a probe waits for nobody, and its one step holds nobody up."""


def probe(client: Client, timeout: float, size: int | None = None) -> Picture:
    """Ask for a picture of one step and `size` pixels; None is the smallest the server allows.

    Its seed is a new one each time, since a response cache would answer an equal request without
    asking the engine.

    Args:
        timeout: seconds for all of it.

    Raises:
        QueueFull: too many requests wait; whoever says so is alive.
        DarkroomError: the server failed, or gave no answer.
    """
    give_up_at = time.monotonic() + timeout
    size = size or _smallest_size(client, timeout)
    return client.generate(
        "",
        num_inference_steps=1,
        guidance_scale=1.0,
        priority=PRIORITY,
        width=size,
        height=size,
        timeout=max(0.0, give_up_at - time.monotonic()),
    )


def _smallest_size(client: Client, timeout: float) -> int | None:
    """What a refusal says is allowed; None, which is the checkpoint's own size, if it says nothing.

    Raises:
        DarkroomError: the server failed, or gave no answer.
    """
    try:
        client.generate("", num_inference_steps=1, width=1, timeout=timeout)
    except InvalidRequest as refusal:
        allowed = re.search(r"width: .* allowed are (\d+) to", str(refusal))
        return int(allowed[1]) if allowed else None
    return None
