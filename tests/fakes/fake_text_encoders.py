"""Text encoders that are formulas: a state is of its token, place, network and layer."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from darkroom_engine.networks import HostNetworks

NUM_LAYERS = 4
POOLED_WIDTH = 3


class FakeTextEncoders(HostNetworks):
    """The `Networks` interface over formulas, as far as text encoders need it."""

    def __init__(self, widths: Mapping[str, int]) -> None:
        """`widths` are the features that each network makes of a token."""
        self.widths = dict(widths)
        self.calls: list[tuple[str, np.ndarray, list[str]]] = []
        """The network, ids and outputs of each call."""
        self.answers: list[np.ndarray] = []
        """Every array that was answered, whose memory is the networks' own."""
        self.fail_next: dict[str, BaseException] = {}
        """What the next call of a network raises."""

    @property
    def called(self) -> list[str]:
        return [network for network, _, _ in self.calls]

    def wait_until_ready(
        self, networks: Sequence[str], timeout_s: float, is_given_up: Callable[[], bool]
    ) -> None:
        """They always are."""

    def run(
        self, network: str, inputs: Mapping[str, np.ndarray], outputs: Sequence[str]
    ) -> list[np.ndarray]:
        error = self.fail_next.pop(network, None)
        if error is not None:
            raise error
        ids = inputs["input_ids"]
        self.calls.append((network, ids, list(outputs)))
        layers = self._layers(network, ids)
        made = {
            "hidden_states": layers,
            "last_hidden_state": layers[:, -1],
            "text_embeds": layers[:, -1].sum(axis=1)[:, :POOLED_WIDTH],
        }
        answers = [made[name] for name in outputs]
        self.answers += answers
        return answers

    def _layers(self, network: str, ids: np.ndarray) -> np.ndarray:
        """(B, K, L, C)."""
        layer = np.arange(NUM_LAYERS)[:, None, None]
        place = np.arange(ids.shape[1])[:, None]
        feature = np.arange(1, self.widths[network] + 1)
        own = sum(network.encode())
        return np.sin(ids[:, None, :, None] * feature / 7 + layer + place + own).astype(np.float32)
