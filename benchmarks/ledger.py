"""What clients and server counted, against each other; and whether memory grows: no clocks here."""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

CLOSED = "closed"
"""The client left: it cannot know what the server made of it."""
_LEFT = ("cancelled", "image", "expired")
"""What the server may have made of such a request."""


def disagreements(client: Mapping[str, int], server: Mapping[str, float]) -> list[str]:
    """Each difference between the outcomes that clients saw and those that the server counted.

    Requests that the client closed may have any outcome of `_LEFT`, but each must have one.
    """
    problems = []
    surplus = Counter({name: int(number) for name, number in server.items()})
    surplus.subtract({name: number for name, number in client.items() if name != CLOSED})
    for name, number in sorted(surplus.items()):
        if number < 0 or (number > 0 and name not in _LEFT):
            problems.append(
                f"{name}: clients saw {client.get(name, 0)}, the server counted "
                f"{server.get(name, 0):.0f}"
            )
    sent, answered = sum(client.values()), sum(server.values())
    if sent != answered:
        problems.append(f"{sent} requests were sent, {answered:.0f} answered")
    return problems


def growth(done: Sequence[int], sizes: Sequence[float]) -> dict[str, float]:
    """How a size grows with the requests done, from when a quarter of them was.

    Returns:
        "at_quarter" and "at_end" are medians of a tenth of the rest, so that one sample's chance
        does not matter; "growth" is their difference, and "per_1000" the slope of a line through
        all samples from the quarter on, for a thousand requests.
    """
    counted = np.array(done, float)
    rest = counted >= counted[-1] / 4
    x, y = counted[rest], np.array(sizes, float)[rest]
    tenth = max(1, len(x) // 10)
    begin, end = float(np.median(y[:tenth])), float(np.median(y[-tenth:]))
    slope = float(np.polyfit(x, y, 1)[0]) if np.ptp(x) > 0 else 0.0
    return {
        "at_quarter": round(begin, 1),
        "at_end": round(end, 1),
        "growth": round(end - begin, 1),
        "per_1000": round(1000 * slope, 2),
    }
