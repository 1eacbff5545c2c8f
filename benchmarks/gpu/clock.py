"""Times of work that a device does while its host goes on."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch


class Clock:
    """Times calls on a device: by its own events on a GPU, by the host's clock on the CPU."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.is_gpu = self.device.type == "cuda"

    def calls_s(self, call: Callable[[], Any], num_calls: int, num_warmups: int = 2) -> list[float]:
        """The time of each call, of which the next is given to the device before one is done."""
        for _ in range(num_warmups):
            call()
        self.wait()
        if not self.is_gpu:
            return [_host_s(call) for _ in range(num_calls)]
        events = [torch.cuda.Event(enable_timing=True) for _ in range(num_calls + 1)]
        events[0].record()
        for event in events[1:]:
            call()
            event.record()
        self.wait()
        return [_between_s(events, n) for n in range(num_calls)]

    def host_s(self, call: Callable[[], Any]) -> float:
        """The time until the device is done, on the host's clock: what a caller waits."""
        self.wait()
        start = time.perf_counter()
        call()
        self.wait()
        return time.perf_counter() - start

    def wait(self) -> None:
        """Until the device has done all that it was given."""
        if self.is_gpu:
            torch.cuda.synchronize(self.device)


def _host_s(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _between_s(events: Sequence[Any], number: int) -> float:
    milliseconds: float = events[number].elapsed_time(events[number + 1])
    return milliseconds / 1000
