"""Whose leftovers may be removed."""

import os


def is_alive(process_id: int) -> bool:
    """Whether there is a process of that id, be it ours or another user's."""
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
