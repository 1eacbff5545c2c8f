"""The seam to the networks: the only file that knows how they are run."""

import time
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from darkroom_engine.arrays import HOST, Array, Arrays
from darkroom_engine.errors import NetworkFailed, NotYetAllowed
from darkroom_engine.memory import available_bytes

Shape = tuple[int, int, int]
"""(C, h, w) of latents."""

Conditioning = dict[str, Array]
"""What the denoiser is told besides the sample and the timestep, one row, by input name."""


class Networks(Protocol):
    """The networks of a checkpoint, by name. Any thread may call, while others are in a call."""

    @property
    def arrays(self) -> Arrays:
        """What the denoiser and the ControlNets take and give; all other networks speak numpy."""

    @property
    def prepared_rows(self) -> Sequence[int]:
        """Batch sizes of the denoiser to be called once before the service begins.

        Their first call at a size of picture takes much longer than later ones.
        """

    def available_bytes(self) -> int:
        """Memory that networks could take now, where they run."""

    def wait_until_ready(
        self, networks: Sequence[str], timeout_s: float, is_given_up: Callable[[], bool]
    ) -> None:
        """Return when all of these can be called; NetworkFailed names the one that cannot.

        `is_given_up` is asked again and again, and ends the waiting at once.
        """

    def run(self, network: str, inputs: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        """The outputs of a call, float32.

        They are numpy's if all inputs are. Else they lie on the device, perhaps still being
        computed.

        Args:
            inputs: by name, each of B rows: (B, ...), or (B,) where a row is one number.
            outputs: the names of those that are wanted.

        Raises:
            NetworkFailed: it cannot answer.
        """


class WrappedNetworks:
    """What those who stand before other networks leave as it is."""

    def __init__(self, networks: Networks) -> None:
        self._networks = networks

    @property
    def arrays(self) -> Arrays:
        return self._networks.arrays

    @property
    def prepared_rows(self) -> Sequence[int]:
        return self._networks.prepared_rows

    def available_bytes(self) -> int:
        return self._networks.available_bytes()


class HostNetworks:
    """What is the same for all networks that are called with numpy's arrays."""

    arrays: Arrays = HOST
    prepared_rows: Sequence[int] = ()

    def available_bytes(self) -> int:
        return available_bytes()


class TritonNetworks(HostNetworks):
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

    def run(self, network: str, inputs: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
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


def _for_triton(array: NDArray[Any]) -> NDArray[Any]:
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
