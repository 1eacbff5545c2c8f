"""Saying what takes long, while it does."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

Progress = Callable[[str], AbstractContextManager[None]]
"""`with progress("doing this"): ...`"""


@contextmanager
def silent_progress(_: str) -> Iterator[None]:
    yield


@contextmanager
def terminal_progress(task: str) -> Iterator[None]:
    """A line on stderr with the task and its running time; on a terminal it moves."""
    start = time.monotonic()
    is_done = threading.Event()

    def say(mark: str, end: str) -> None:
        print(f"\r{mark} {task} {time.monotonic() - start:5.1f} s", end=end, file=sys.stderr)
        sys.stderr.flush()

    def animate() -> None:
        frames = "|/-\\"
        turn = 0
        while not is_done.wait(0.2):
            say(frames[turn % len(frames)], "")
            turn += 1

    thread = threading.Thread(target=animate, daemon=True)
    if sys.stderr.isatty():
        thread.start()
    mark = "x"
    try:
        yield
        mark = "+"
    finally:
        is_done.set()
        if thread.is_alive():
            thread.join()
        say(mark, "\n")
