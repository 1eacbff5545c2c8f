"""Networks that outlive the processes they run in."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence

from darkroom_engine.arrays import Array
from darkroom_engine.errors import NetworkFailed, NotYetAllowed
from darkroom_engine.networks import Networks, WrappedNetworks

RETRY_S = 0.1

logger = logging.getLogger(__name__)


class SteadyNetworks(WrappedNetworks):
    """Any `Networks`, and patient: a call that failed is made once more.

    In between, the network's first call is tried until it is answered, because a process that died
    takes seconds to be replaced. Samples lose nothing by that: their state is the engine's, and
    it changes only when a step has succeeded.
    """

    def __init__(
        self, networks: Networks, heal_timeout_s: float, on_failure: Callable[[str], None]
    ) -> None:
        """Wrap `networks`.

        Args:
            heal_timeout_s: how long a call waits for a network that is away.
            on_failure: called with the name of a network whose call failed.
        """
        super().__init__(networks)
        self._heal_timeout_s = heal_timeout_s
        self._on_failure = on_failure
        self._is_given_up: Callable[[], bool] = lambda: False
        self._first_calls: dict[str, tuple[Mapping[str, Array], Sequence[str]]] = {}
        self._away_since: dict[str, float] = {}
        self.num_failures = 0
        """Calls that failed; how long a call took during which this grew says nothing."""

    def wait_until_ready(
        self, networks: Sequence[str], timeout_s: float, is_given_up: Callable[[], bool]
    ) -> None:
        """As `Networks.wait_until_ready`; `is_given_up` ends later waiting too."""
        self._is_given_up = is_given_up
        self._networks.wait_until_ready(networks, timeout_s, is_given_up)

    def first_run(
        self, network: str, inputs: Mapping[str, Array], outputs: Sequence[str], timeout_s: float
    ) -> list[Array]:
        """The first call of a network, a small one, by which it will be tried later.

        Raises:
            NetworkFailed: it cannot answer, or must not be called for as long as `timeout_s`.
        """
        self._first_calls[network] = (inputs, outputs)
        give_up_at = time.monotonic() + timeout_s
        while True:
            try:
                return self._networks.run(network, inputs, outputs)
            except NotYetAllowed:
                if self._is_given_up() or time.monotonic() > give_up_at:
                    raise
                time.sleep(RETRY_S)

    def run(self, network: str, inputs: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        try:
            return self._networks.run(network, inputs, outputs)
        except NetworkFailed as error:
            self._count(error)
            if error.is_final:
                raise
            logger.warning("%s; trying once more", error)
            self._wait_until_answered(network, error)
        try:
            return self._networks.run(network, inputs, outputs)
        except NetworkFailed as error:
            self._count(error)
            raise

    def _count(self, error: NetworkFailed) -> None:
        self.num_failures += 1
        self._on_failure(error.network)

    def _wait_until_answered(self, network: str, error: NetworkFailed) -> None:
        # One wait for each time that it is away, not for each call: once that was in vain, later
        # calls fail at once, until one of them finds it back.
        away_since = self._away_since.setdefault(network, time.monotonic())
        give_up_at = away_since + self._heal_timeout_s
        while True:
            try:
                self._networks.run(network, *self._first_calls[network])
            except NetworkFailed as still:
                is_over = still.is_final or self._is_given_up()
                if is_over or time.monotonic() > give_up_at:
                    raise error from None
                time.sleep(RETRY_S)
            else:
                self._away_since.pop(network, None)
                return
