"""What the arrays of the running batch are, and where they lie: in numpy's, or on a device."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Array = Any
"""numpy's, or a tensor of another library: arithmetic, `@`, slices and `reshape` mean the same."""


class Arrays(Protocol):
    """The few operations on a batch's arrays that libraries spell differently.

    A device computes while its host goes on: only `to_host` waits, and what `fetch` returns. Both
    raise NetworkFailed where the device has failed meanwhile.
    """

    max_steps_ahead: int
    """Steps that may be under way when the next begins; 0 where nothing is computed beside."""

    def from_host(self, array: NDArray[Any]) -> Array:
        """The same numbers, of the same type, where the batch is."""

    def to_host(self, array: Array) -> NDArray[Any]: ...

    def fetch(self, array: Array) -> Callable[[], NDArray[Any]]:
        """Begin to bring an array to the host, as it is now; the call waits until it is there."""

    def zeros(self, shape: tuple[int, ...]) -> Array:
        """Of float32."""

    def copy(self, array: Array) -> Array: ...

    def stack(self, arrays: Sequence[Array]) -> Array:
        """Along a new first axis."""

    def concatenate(self, arrays: Sequence[Array], axis: int) -> Array: ...

    def std(self, array: Array) -> Array:
        """Of all elements, with one degree of freedom less."""

    def finite_rows(self, array: Array) -> Array:
        """(N,) of bool: in which rows of (N, ...) all numbers are finite."""


class HostArrays:
    """numpy's arrays, where everything is done when a call returns."""

    max_steps_ahead = 0

    def from_host(self, array: NDArray[Any]) -> NDArray[Any]:
        return array

    def to_host(self, array: NDArray[Any]) -> NDArray[Any]:
        return array

    def fetch(self, array: NDArray[Any]) -> Callable[[], NDArray[Any]]:
        return lambda: array

    def zeros(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        return np.zeros(shape, np.float32)

    def copy(self, array: NDArray[Any]) -> NDArray[Any]:
        return array.copy()

    def stack(self, arrays: Sequence[NDArray[Any]]) -> NDArray[Any]:
        return np.stack(arrays)

    def concatenate(self, arrays: Sequence[NDArray[Any]], axis: int) -> NDArray[Any]:
        return np.concatenate(arrays, axis)

    def std(self, array: NDArray[Any]) -> Any:
        return array.std(ddof=1)

    def finite_rows(self, array: NDArray[Any]) -> NDArray[np.bool_]:
        flags: NDArray[np.bool_] = np.isfinite(array).reshape(len(array), -1).all(axis=1)
        return flags


HOST = HostArrays()
