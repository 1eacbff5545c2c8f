"""The device: what it is, and how fast it multiplies and copies."""

import shutil
import subprocess
from typing import Any, Self

import torch

from benchmarks.gpu.clock import Clock
from benchmarks.gpu.scale import Scale
from benchmarks.gpu.summary import spread

_ASKED = (
    *("name", "driver_version", "memory.total", "memory.used", "power.limit", "power.draw"),
    *("clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "temperature.gpu"),
    *("utilization.gpu", "persistence_mode", "mig.mode.current"),
)


def describe() -> dict[str, Any]:
    """What PyTorch and nvidia-smi say of it; nothing is said of a device that is not there."""
    described: dict[str, Any] = {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "num_threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        device = torch.cuda.get_device_properties(0)
        described |= {
            "name": device.name,
            "capability": f"{device.major}.{device.minor}",
            "multiprocessors": device.multi_processor_count,
            "memory_bytes": device.total_memory,
        }
    return described | {"nvidia_smi": ask_nvidia_smi()}


def ask_nvidia_smi() -> dict[str, str] | None:
    """Driver, clocks and power of the first GPU, now; None where there is no nvidia-smi."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, f"--query-gpu={','.join(_ASKED)}", "--format=csv,noheader", "--id=0"]
    result = subprocess.run(  # noqa: S603  our own command line
        command, check=False, capture_output=True, text=True, timeout=60
    )
    if result.returncode != 0:
        return {"error": (result.stderr or result.stdout).strip()}
    values = [value.strip() for value in result.stdout.splitlines()[0].split(",")]
    return dict(zip(_ASKED, values, strict=False))


def measure(clock: Clock, scale: Scale, dtype: torch.dtype) -> dict[str, Any]:
    """The rate of a large product of matrices, and of a copy on the device.

    On random numbers: zeros take less power, and are multiplied faster than real ones.
    """
    size = scale.matmul_size
    products_s = _products_s(clock, size, dtype, scale.num_calls)
    copies_s = _copies_s(clock, scale.copied_bytes, scale.num_calls)
    operations = 2 * size**3
    return {
        "matmul": {
            "size": size,
            "dtype": str(dtype).removeprefix("torch."),
            "tflops": spread([operations / s / 1e12 for s in products_s], 5),
        },
        "copy": {
            "bytes": scale.copied_bytes,
            # Each byte is read and written.
            "gb_per_s": spread([2 * scale.copied_bytes / s / 1e9 for s in copies_s], 1),
        },
        "nvidia_smi_after": ask_nvidia_smi(),
    }


def _products_s(clock: Clock, size: int, dtype: torch.dtype, num_calls: int) -> list[float]:
    left, right, made = (
        torch.randn(size, size, device=clock.device, dtype=dtype) for _ in range(3)
    )
    return clock.calls_s(lambda: torch.mm(left, right, out=made), num_calls, num_warmups=5)


def _copies_s(clock: Clock, size: int, num_calls: int) -> list[float]:
    source = torch.empty(size, dtype=torch.uint8, device=clock.device).random_()
    target = torch.empty_like(source)
    return clock.calls_s(lambda: target.copy_(source), num_calls, num_warmups=3)


class PeakMemory:
    """The most memory that PyTorch held on the device while its block ran."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.bytes: dict[str, int] = {}

    def __enter__(self) -> Self:
        if self._clock.is_gpu:
            torch.cuda.reset_peak_memory_stats(self._clock.device)
            self._before = torch.cuda.memory_allocated(self._clock.device)
        return self

    def __exit__(self, *_: object) -> None:
        if not self._clock.is_gpu:
            return
        free, total = torch.cuda.mem_get_info(self._clock.device)
        self.bytes = {
            # By what else is loaded.
            "allocated_before": self._before,
            "allocated": torch.cuda.max_memory_allocated(self._clock.device),
            "reserved": torch.cuda.max_memory_reserved(self._clock.device),
            # By all processes, at the end: graphs and libraries take some beside PyTorch's.
            "used_on_device_at_end": total - free,
        }
