"""Model control of networks that are formulas, and networks that are loaded or not."""

import threading
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from darkroom_engine.errors import NetworkFailed
from darkroom_engine.networks import HostNetworks


class FakeServer(HostNetworks):
    """The `ModelControl` and the `Networks` interface of one server; a call must find its network.

    `told` is what happened, in order: "+name" a load, "-name" an unload, "name" a call.
    """

    def __init__(self) -> None:
        self.told: list[str] = []
        self.loaded: set[str] = set()
        self.most_loaded = 0
        """How many networks were loaded together, at the most."""
        self.fails: dict[str, str] = {}
        """What goes wrong with loading a network, or with unloading it, where its name has a
        "-" before it."""
        self.load_gate = threading.Event()
        """While cleared, loads wait."""
        self.load_gate.set()
        self.call_gates: dict[str, threading.Event] = {}
        """While one is cleared, calls of its network wait."""
        self.on_call: Callable[[str], object] = lambda _: None
        self.answer: Callable[..., list[np.ndarray]] = lambda _, inputs, outputs: [
            inputs["x"] for _ in outputs
        ]
        """What a call returns."""
        self.running: set[str] = set()
        self._lock = threading.Lock()

    def load(self, network: str) -> None:
        self.load_gate.wait()
        with self._lock:
            if network in self.fails:
                self.told.append(f"!{network}")
                raise NetworkFailed(network, self.fails[network])
            self.told.append(f"+{network}")
            self.loaded.add(network)
            self.most_loaded = max(self.most_loaded, len(self.loaded))

    def unload(self, network: str) -> None:
        with self._lock:
            assert network not in self.running, "unloaded under a call"
            if f"-{network}" in self.fails:
                raise NetworkFailed(network, self.fails[f"-{network}"])
            if network in self.loaded:
                self.told.append(f"-{network}")
                self.loaded.remove(network)

    def wait_until_ready(
        self, networks: Sequence[str], timeout_s: float, is_given_up: Callable[[], bool]
    ) -> None:
        if is_given_up():
            raise NetworkFailed("server", f"not ready within {timeout_s:g} s")
        assert self.loaded.issuperset(networks)

    def run(
        self, network: str, inputs: Mapping[str, np.ndarray], outputs: Sequence[str]
    ) -> list[np.ndarray]:
        with self._lock:
            self.told.append(network)
            assert network in self.loaded, f"{network} is called, but not loaded"
            self.running.add(network)
        self.on_call(network)
        if network in self.call_gates:
            self.call_gates[network].wait()
        with self._lock:
            self.running.discard(network)
        return self.answer(network, inputs, outputs)
