"""Networks that are formulas: every output depends on its own row alone, and on all of it."""

import threading
import time
from collections.abc import Callable

import numpy as np

from darkroom_engine.errors import NetworkFailed

HIDDEN = 6


class FakeNetworks:
    """The `Networks` interface over formulas, with switches to hold, fail and watch calls.

    Any mixing of rows, timesteps or embeddings between neighbours changes a picture, because each
    output row is a nonlinear function of exactly its own inputs.
    """

    def __init__(self) -> None:
        self.step_rows: list[int] = []
        """Rows of every UNet call but the blank ones, which warm up and try."""
        self.encoded: list[np.ndarray] = []
        self.gate = threading.Event()
        """While cleared, UNet calls wait."""
        self.gate.set()
        self.decode_gate = threading.Event()
        """While cleared, VAE calls wait, but those whose input is all zeros."""
        self.decode_gate.set()
        self.is_entered = threading.Event()
        """Set while a UNet call waits or runs."""
        self.fail_next: dict[str, BaseException] = {}
        """What the next call of a network raises."""
        self.fail_always: dict[str, BaseException] = {}
        """What every call of a network raises, but for those whose input is all zeros."""
        self.away: dict[str, BaseException] = {}
        """What every call of a network raises, as when its process has died."""
        self.poison_token: int | None = None
        """Rows whose prompt holds this token come out as NaN."""
        self.is_missing = False
        self.is_loading = False

    def wait_until_ready(self, timeout_s: float, is_given_up: Callable[[], bool]) -> None:
        while self.is_loading and not is_given_up():
            time.sleep(0.001)
        if self.is_missing or self.is_loading:
            raise NetworkFailed("unet", f"not ready within {timeout_s:g} s")

    def encode(self, input_ids: np.ndarray, clip_skip: int) -> dict[str, np.ndarray]:
        self._maybe_fail("text_encoder", input_ids)
        self.encoded.append(input_ids)
        frequency = np.arange(1, HIDDEN + 1) / (7 + clip_skip)
        hidden = np.sin(input_ids[:, :, None] * frequency).astype(np.float32)
        if self.poison_token is not None:
            hidden[(input_ids == self.poison_token).any(axis=1)] = np.nan
        return {"encoder_hidden_states": hidden}

    def denoise(self, sample: np.ndarray, timestep: np.ndarray, conditioning: dict) -> np.ndarray:
        self.is_entered.set()
        self.gate.wait()
        if sample.any():
            self.step_rows.append(len(sample))
        self._maybe_fail("unet", sample)
        hidden = conditioning["encoder_hidden_states"]
        assert len(sample) == len(timestep) == len(hidden)
        out = np.empty_like(sample)
        for row in range(len(sample)):
            bias = np.float32((hidden[row] * np.arange(1, HIDDEN + 1)).mean())
            out[row] = np.sin(sample[row] * (1 + bias) + timestep[row] / 200 + bias)
        return out

    def decode(self, latents: np.ndarray) -> np.ndarray:
        if latents.any():
            self.decode_gate.wait()
        self._maybe_fail("vae_decoder", latents)
        return np.tanh(latents[:, :3].repeat(8, axis=2).repeat(8, axis=3))

    def _maybe_fail(self, network: str, values: np.ndarray) -> None:
        error = self.fail_next.pop(network, None) or self.away.get(network)
        if error is None and values.any():
            error = self.fail_always.get(network)
        if error is not None:
            raise error
