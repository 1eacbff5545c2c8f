"""The seam to the networks: the only file that knows how they are run."""

import time
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from darkroom_engine.errors import NetworkFailed, NotYetAllowed

Array = NDArray[Any]

Shape = tuple[int, int, int]
"""(C, h, w) of latents."""

Conditioning = dict[str, NDArray[np.float32]]
"""What the denoiser is told besides the sample and the timestep, one row, by input name."""


class Networks(Protocol):
    """The networks of a checkpoint, by name. Any thread may call, while others are in a call."""

    def wait_until_ready(
        self, networks: Sequence[str], timeout_s: float, is_given_up: Callable[[], bool]
    ) -> None:
        """Return when all of these can be called; NetworkFailed names the one that cannot.

        `is_given_up` is asked again and again, and ends the waiting at once.
        """

    def run(
        self, network: str, inputs: Mapping[str, Array], outputs: Sequence[str]
    ) -> list[NDArray[np.float32]]:
        """The outputs of a call.

        Args:
            inputs: by name, each of B rows: (B, ...), or (B,) where a row is one number.
            outputs: the names of those that are wanted.

        Raises:
            NetworkFailed: it cannot answer.
        """


class TritonNetworks:
    """Networks that are Triton models of any backend, called by BLS from the model `caller`."""

    def __init__(self, pb_utils: ModuleType, caller: str, prefix: str = "") -> None:
        """`prefix` is what Triton's names of the networks begin with, in this server."""
        self._pb_utils = pb_utils
        self._caller = caller
        self._prefix = prefix

    def wait_until_ready(
        self, networks: Sequence[str], timeout_s: float, is_given_up: Callable[[], bool]
    ) -> None:
        # Triton refuses BLS while the server starts, and while the calling model itself loads.
        # It tells nobody when that is over, so that there is nothing to do but to ask again.
        give_up_at = time.monotonic() + timeout_s
        for model in (*(self._prefix + network for network in networks), self._caller):
            while not self._is_ready(model):
                if is_given_up() or time.monotonic() > give_up_at:
                    raise NetworkFailed(model, f"not ready within {timeout_s:g} s")
                time.sleep(0.05)

    def run(
        self, network: str, inputs: Mapping[str, Array], outputs: Sequence[str]
    ) -> list[NDArray[np.float32]]:
        pb_utils = self._pb_utils
        request = pb_utils.InferenceRequest(
            model_name=self._prefix + network,
            requested_output_names=list(outputs),
            inputs=[pb_utils.Tensor(name, _for_triton(array)) for name, array in inputs.items()],
        )
        try:
            response = request.exec()
        except pb_utils.TritonModelException as error:
            raise _failure(network, str(error)) from error
        if response.has_error():
            raise _failure(network, response.error().message())
        arrays = {tensor.name(): tensor.as_numpy() for tensor in response.output_tensors()}
        return [arrays[name] for name in outputs]

    def _is_ready(self, model: str) -> bool:
        try:
            return bool(self._pb_utils.is_model_ready(model))
        except self._pb_utils.TritonModelException:
            return False


def _for_triton(array: Array) -> Array:
    # Triton counts the batch apart from a tensor's own dimensions, of which there is one at least.
    return np.ascontiguousarray(array[:, None] if array.ndim == 1 else array)


def _failure(network: str, problem: str) -> NetworkFailed:
    # When a new instance of the calling model takes the place of an old one, Triton says that the
    # model is ready while the new one is still being loaded.
    if "BLS is only supported during" in problem:
        return NotYetAllowed(network, problem)
    # Triton says so while it starts, which is waited for, and then only when it stops: it lets no
    # request in any more, and waits for those that are here.
    return NetworkFailed(network, problem, is_final="Server not ready" in problem)
