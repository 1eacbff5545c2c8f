"""Networks that outlive the processes they run in."""

import logging
import time
from collections.abc import Callable
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from darkroom_engine.errors import NetworkFailed, NotYetAllowed
from darkroom_engine.manifest import Manifest
from darkroom_engine.networks import Networks
from darkroom_engine.sample import Conditioning, Shape

RETRY_S = 0.1

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")


class SteadyNetworks:
    """Any `Networks`, warmed up, and patient: a call that failed is made once more.

    In between, a small call is tried until the network answers it, because a process that died
    takes seconds to be replaced. Samples lose nothing by that: their state is the engine's, and
    it changes only when a step has succeeded.
    """

    def __init__(
        self,
        networks: Networks,
        manifest: Manifest,
        heal_timeout_s: float,
        on_failure: Callable[[str], None],
    ) -> None:
        """Wrap `networks`.

        Args:
            heal_timeout_s: how long a call waits for a network that is away.
            on_failure: called with the name of a network whose call failed.
        """
        self._networks = networks
        self._manifest = manifest
        self._heal_timeout_s = heal_timeout_s
        self._on_failure = on_failure
        self._is_given_up: Callable[[], bool] = lambda: False
        self._away_since: dict[str, float] = {}
        self.num_failures = 0
        """Calls that failed; how long a call took during which this grew says nothing."""
        size = int(manifest.limits["min_size"]) // manifest.vae_scale_factor
        self.smallest_shape = (manifest.latent_channels, size, size)
        self._input_ids = np.zeros((1, manifest.tokenizer["max_length"]), np.int64)
        self._conditioning: Conditioning = {}

    def wait_until_ready(self, timeout_s: float, is_given_up: Callable[[], bool]) -> None:
        """As `Networks.wait_until_ready`; also makes the first call of each network.

        Raises:
            NetworkFailed: a network is not there, fails, or makes something of another shape.
        """
        give_up_at = time.monotonic() + timeout_s
        self._is_given_up = is_given_up
        self._networks.wait_until_ready(timeout_s, is_given_up)
        while True:
            try:
                self._make_first_calls()
            except NotYetAllowed:
                if is_given_up() or time.monotonic() > give_up_at:
                    raise
                time.sleep(RETRY_S)
            else:
                return

    def _make_first_calls(self) -> None:
        networks, shape = self._networks, self.smallest_shape
        rows = networks.encode(self._input_ids, 0)
        self._conditioning = {name: np.array(row[0]) for name, row in rows.items()}
        self.denoise_blank(1, shape)
        pixels = networks.decode(np.zeros((1, *shape), np.float32))
        factor = self._manifest.vae_scale_factor
        expected = (1, 3, shape[1] * factor, shape[2] * factor)
        if pixels.shape != expected:
            raise NetworkFailed("vae_decoder", f"made {pixels.shape}, expected {expected}")

    def denoise_blank(self, num_rows: int, shape: Shape) -> None:
        """A UNet call of that size whose output nobody needs."""
        latents = np.zeros((num_rows, *shape), np.float32)
        conditioning = {
            name: np.stack([row] * num_rows) for name, row in self._conditioning.items()
        }
        output = self._networks.denoise(latents, np.zeros(num_rows, np.float32), conditioning)
        if output.shape != latents.shape:
            raise NetworkFailed("unet", f"made {output.shape} of {latents.shape}")

    def encode(self, input_ids: NDArray[np.int64], clip_skip: int) -> Conditioning:
        return self._twice(
            "text_encoder",
            lambda: self._networks.encode(input_ids, clip_skip),
            lambda: self._networks.encode(self._input_ids, 0),
        )

    def denoise(
        self, sample: NDArray[np.float32], timestep: NDArray[np.float32], conditioning: Conditioning
    ) -> NDArray[np.float32]:
        return self._twice(
            "unet",
            lambda: self._networks.denoise(sample, timestep, conditioning),
            lambda: self.denoise_blank(1, self.smallest_shape),
        )

    def decode(self, latents: NDArray[np.float32]) -> NDArray[np.float32]:
        return self._twice(
            "vae_decoder",
            lambda: self._networks.decode(latents),
            lambda: self._networks.decode(np.zeros((1, *self.smallest_shape), np.float32)),
        )

    def _twice(
        self, network: str, call: Callable[[], Answer], probe: Callable[[], object]
    ) -> Answer:
        try:
            return call()
        except NetworkFailed as error:
            self._count(error)
            if error.is_final:
                raise
            logger.warning("%s; trying once more", error)
            self._wait_until_answered(network, probe, error)
        try:
            return call()
        except NetworkFailed as error:
            self._count(error)
            raise

    def _count(self, error: NetworkFailed) -> None:
        self.num_failures += 1
        self._on_failure(error.network)

    def _wait_until_answered(
        self, network: str, probe: Callable[[], object], error: NetworkFailed
    ) -> None:
        # One wait for each time that it is away, not for each call: once that was in vain, later
        # calls fail at once, until one of them finds it back.
        away_since = self._away_since.setdefault(network, time.monotonic())
        give_up_at = away_since + self._heal_timeout_s
        while True:
            try:
                probe()
            except NetworkFailed as still:
                is_over = still.is_final or self._is_given_up()
                if is_over or time.monotonic() > give_up_at:
                    raise error from None
                time.sleep(RETRY_S)
            else:
                self._away_since.pop(network, None)
                return
