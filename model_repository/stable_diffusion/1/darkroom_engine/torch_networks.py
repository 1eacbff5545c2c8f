"""Networks that PyTorch runs in the engine's process, and a batch's arrays where they run.

Only an engine of such networks imports this file, and with it PyTorch.
"""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from functools import partial
from typing import Any, Self

import torch
from numpy.typing import NDArray

import darkroom_torch
from darkroom_engine import memory
from darkroom_engine.arrays import Array, Arrays
from darkroom_engine.errors import NetworkFailed
from darkroom_engine.manifest import Manifest
from darkroom_settings import TorchSettings
from darkroom_torch import Fetched, TorchNetwork

POLL_S = 0.05


class TorchArrays:
    """PyTorch's tensors on one device, on the stream that is current there."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.max_steps_ahead = 1 if device.type == "cuda" else 0

    def from_host(self, array: NDArray[Any]) -> torch.Tensor:
        return darkroom_torch.to_device(array, self._device)

    def to_host(self, array: torch.Tensor) -> NDArray[Any]:
        return _waited(Fetched(array))

    def fetch(self, array: torch.Tensor) -> Callable[[], NDArray[Any]]:
        # On the CPU what is fetched must be a copy too, to stay as it is now.
        fetched = Fetched(array if self.max_steps_ahead else array.clone())
        return lambda: _waited(fetched)

    def zeros(self, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.zeros(shape, device=self._device)

    def copy(self, array: torch.Tensor) -> torch.Tensor:
        return array.clone()

    def stack(self, arrays: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.stack(tuple(arrays))

    def concatenate(self, arrays: Sequence[torch.Tensor], axis: int) -> torch.Tensor:
        return torch.cat(tuple(arrays), axis)

    def std(self, array: torch.Tensor) -> torch.Tensor:
        return array.std()

    def finite_rows(self, array: torch.Tensor) -> torch.Tensor:
        return array.isfinite().flatten(start_dim=1).all(dim=1)


class TorchNetworks:
    """The programs of a repository, each loaded when it is first waited for."""

    def __init__(self, manifest: Manifest, device: torch.device, settings: TorchSettings) -> None:
        """Prepare to run the networks on a device.

        Raises:
            ValueError: a bucket has more rows than the denoiser takes.
        """
        denoiser = manifest.denoiser.network
        most = manifest.networks[denoiser].max_batch_size
        is_recorded = device.type == "cuda" and bool(settings.cuda_graphs)
        if is_recorded and settings.row_buckets[-1] > most:
            raise ValueError(
                f"row_buckets: {settings.row_buckets[-1]} is above the {most} that the {denoiser} "
                "takes"
            )
        self._manifest = manifest
        self._device = device
        self._settings = settings
        self._networks: dict[str, TorchNetwork] = {}
        self.arrays: Arrays = TorchArrays(device)
        self.prepared_rows: Sequence[int] = ()
        if is_recorded:
            self.prepared_rows = settings.row_buckets
        elif settings.compile:
            # One row is a case of its own to a compiler, and then any number is.
            self.prepared_rows = (1, 2)

    @classmethod
    def on(cls, manifest: Manifest, settings: TorchSettings, number: int = 0) -> Self:
        """The networks of engine `number`, on the device that the settings give it.

        Raises:
            ValueError: there is no such device.
        """
        return cls(manifest, darkroom_torch.pick_device(settings.device, number), settings)

    def available_bytes(self) -> int:
        if self._device.type != "cuda":
            return memory.available_bytes()
        free, _ = torch.cuda.mem_get_info(self._device)
        # PyTorch keeps what it needed once, and takes of that first.
        kept = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        return free + kept

    def wait_until_ready(
        self, networks: Sequence[str], timeout_s: float, is_given_up: Callable[[], bool]
    ) -> None:
        give_up_at = time.monotonic() + timeout_s
        for network in networks:
            if network in self._networks:
                continue
            loading = _in_background(partial(self._load, network))
            while not wait([loading], POLL_S).done:
                if is_given_up() or time.monotonic() > give_up_at:
                    raise NetworkFailed(network, f"not loaded within {timeout_s:g} s")
            try:
                self._networks[network] = loading.result()
            except Exception as error:
                raise self._failure(network, error) from error

    def run(self, network: str, inputs: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        if network not in self._networks:
            raise NetworkFailed(network, "is not loaded")
        try:
            return self._networks[network].run(inputs, outputs)
        except Exception as error:
            raise self._failure(network, error) from error

    def _load(self, network: str) -> TorchNetwork:
        manifest = self._manifest
        folder = manifest.directory / network / "1"
        has_adapters = (folder / "adapters").is_dir()
        fillers = {
            residual.name: {
                "channels": residual.channels,
                "divisor": residual.divisor,
                "like": manifest.denoiser.sample,
            }
            for residual in manifest.denoiser.residuals
        }
        return TorchNetwork.open(
            folder / darkroom_torch.PROGRAM,
            self._device,
            self._settings,
            fillers=fillers,
            lora_names=manifest.loras if has_adapters else (),
        )

    def _failure(self, network: str, error: Exception) -> NetworkFailed:
        if self._device.type == "cuda" and _shortage(error):
            # So that the next try, or another network, has more.
            torch.cuda.empty_cache()
        return failure_of(network, error, self._is_lost)

    def _is_lost(self) -> bool:
        """Whether nothing can be computed on the device any more, in this process."""
        if self._device.type != "cuda":
            return False
        try:
            torch.cuda.synchronize(self._device)
        except RuntimeError:
            return True
        return False


def _waited(fetched: Fetched) -> NDArray[Any]:
    """What was fetched.

    Raises:
        NetworkFailed: the device failed meanwhile, in whatever it computed, and fails for good.
    """
    try:
        return fetched.array()
    except RuntimeError as error:
        raise failure_of("device", error, lambda: True) from error


def failure_of(network: str, error: Exception, is_lost: Callable[[], bool]) -> NetworkFailed:
    """What an error of PyTorch's is to the engine."""
    shortage = _shortage(error)
    # PyTorch adds advice for those who wrote the program.
    problem = (str(shortage or error).strip() or repr(error)).splitlines()[0]
    if shortage:
        return NetworkFailed(network, problem)
    if isinstance(error, RuntimeError) and is_lost():
        # An error on the device itself, such as a wrong address, ends all use of it by a process.
        return NetworkFailed(
            network, f"the GPU is lost to this process, start it anew; {problem}", is_final=True
        )
    return NetworkFailed(network, problem)


def _shortage(error: BaseException) -> torch.OutOfMemoryError | None:
    """That of memory which an error is, or followed on: a recording that broke off fails too."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, torch.OutOfMemoryError):
        cause = cause.__cause__ or cause.__context__
    return cause


def _in_background(load: Callable[[], TorchNetwork]) -> "Future[TorchNetwork]":
    """On a thread that nobody has to wait for."""
    future: Future[TorchNetwork] = Future()

    def run() -> None:
        try:
            future.set_result(load())
        except BaseException as error:  # noqa: BLE001  it is raised where the result is asked for
            future.set_exception(error)

    threading.Thread(target=run, name="loader", daemon=True).start()
    return future
