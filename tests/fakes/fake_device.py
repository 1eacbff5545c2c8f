"""A device: arrays that only its own operations can read, of steps that end when it says so."""

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from fake_networks import FakeNetworks


class DeviceArray:
    """What tensors and numpy's arrays have in common, and no way to the host."""

    def __init__(self, values: np.ndarray) -> None:
        self.values = values

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, key: Any) -> "DeviceArray":
        return DeviceArray(self.values[key])

    def __setitem__(self, key: Any, value: "DeviceArray") -> None:
        self.values[key] = _values(value)

    def reshape(self, *shape: Any) -> "DeviceArray":
        return DeviceArray(self.values.reshape(*shape))

    def __add__(self, other: Any) -> "DeviceArray":
        return DeviceArray(self.values + _values(other))

    def __sub__(self, other: Any) -> "DeviceArray":
        return DeviceArray(self.values - _values(other))

    def __rsub__(self, other: Any) -> "DeviceArray":
        return DeviceArray(_values(other) - self.values)

    def __mul__(self, other: Any) -> "DeviceArray":
        return DeviceArray(self.values * _values(other))

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> "DeviceArray":
        return DeviceArray(self.values / _values(other))

    def __matmul__(self, other: Any) -> "DeviceArray":
        return DeviceArray(self.values @ _values(other))

    def __array__(self, *_: object) -> np.ndarray:
        raise AssertionError("read from the device without waiting for it")


class DeviceArrays:
    """The `Arrays` interface. `gate` holds what the device computes, `is_waited_for` is set where
    somebody waits for it."""

    max_steps_ahead = 1

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.is_waited_for = threading.Event()
        self.fails: Exception | None = None
        """What waiting for it raises."""

    def from_host(self, array: np.ndarray) -> DeviceArray:
        return DeviceArray(np.array(array))

    def to_host(self, array: DeviceArray) -> np.ndarray:
        return self.fetch(array)()

    def fetch(self, array: DeviceArray) -> Callable[[], np.ndarray]:
        values = array.values.copy()

        def wait() -> np.ndarray:
            self.is_waited_for.set()
            self.gate.wait()
            if self.fails:
                raise self.fails
            return values

        return wait

    def zeros(self, shape: tuple[int, ...]) -> DeviceArray:
        return DeviceArray(np.zeros(shape, np.float32))

    def copy(self, array: DeviceArray) -> DeviceArray:
        return DeviceArray(array.values.copy())

    def stack(self, arrays: Sequence[DeviceArray]) -> DeviceArray:
        return DeviceArray(np.stack([array.values for array in arrays]))

    def concatenate(self, arrays: Sequence[DeviceArray], axis: int) -> DeviceArray:
        return DeviceArray(np.concatenate([array.values for array in arrays], axis))

    def std(self, array: DeviceArray) -> DeviceArray:
        return DeviceArray(array.values.std(ddof=1))

    def finite_rows(self, array: DeviceArray) -> DeviceArray:
        return DeviceArray(np.isfinite(array.values).reshape(len(array), -1).all(axis=1))


class DeviceNetworks(FakeNetworks):
    """The fake networks, on that device."""

    prepared_rows = (2, 3, 40)

    def __init__(self) -> None:
        super().__init__()
        self.arrays = DeviceArrays()
        self.blank_rows: list[tuple[int, int]] = []
        """Rows and latent width of the denoiser's calls with nothing."""

    def run(self, network: str, inputs: Mapping[str, Any], outputs: Sequence[str]) -> list[Any]:
        on_host = {name: _values(array) for name, array in inputs.items()}
        if network == "unet" and not on_host["sample"].any():
            self.blank_rows.append((len(on_host["sample"]), on_host["sample"].shape[-1]))
        made = super().run(network, on_host, outputs)
        if not any(isinstance(array, DeviceArray) for array in inputs.values()):
            return made
        return [DeviceArray(array) for array in made]


def _values(value: Any) -> Any:
    return value.values if isinstance(value, DeviceArray) else value
