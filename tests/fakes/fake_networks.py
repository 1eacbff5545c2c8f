"""Networks that are formulas: every output depends on its own row alone, and on all of it."""

import threading
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from darkroom_engine.errors import NetworkFailed
from darkroom_engine.networks import HostNetworks

HIDDEN = 6
LAYERS = 3
FACTOR = 8


class FakeNetworks(HostNetworks):
    """The `Networks` interface over formulas, with switches to hold, fail and watch calls.

    Any mixing of rows, timesteps or conditioning between neighbours changes a picture, because each
    output row is a nonlinear function of exactly its own inputs. A network whose name begins as one
    of those known is of its kind: `unet_watercolor` is a unet, and another one than `unet`.
    """

    def __init__(self) -> None:
        self.step_rows: list[int] = []
        """Rows of every UNet call but the blank ones, which warm up and try."""
        self.step_networks: list[str] = []
        """Which network each of those calls was to."""
        self.step_inputs: list[set[str]] = []
        """The names of the inputs of each of those calls."""
        self.encoded: list[np.ndarray] = []
        self.num_pictures_encoded = 0
        """Calls of the VAE encoder but the blank ones."""
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
        self.nsfw_above: float | None = None
        """What the safety checker finds fault with: a mean above this."""
        self.is_missing = False
        self.is_loading = False

    def wait_until_ready(
        self, networks: Sequence[str], timeout_s: float, is_given_up: Callable[[], bool]
    ) -> None:
        assert "unet" in networks
        while self.is_loading and not is_given_up():
            time.sleep(0.001)
        if self.is_missing or self.is_loading:
            raise NetworkFailed("unet", f"not ready within {timeout_s:g} s")

    def run(
        self, network: str, inputs: Mapping[str, np.ndarray], outputs: Sequence[str]
    ) -> list[np.ndarray]:
        kinds: dict[str, Callable[..., dict[str, np.ndarray]]] = {
            "text_encoder": self._encode_text,
            "unet": self._denoise,
            "controlnet": self._control,
            "vae_decoder": self._decode,
            "vae_encoder": self._encode_picture,
            "safety_checker": self._check,
        }
        kind = next(kind for kind in kinds if network.startswith(kind))
        assert len({len(array) for array in inputs.values()}) == 1, "rows differ in number"
        made = kinds[kind](network, **inputs)
        return [made[name] for name in outputs]

    def _encode_text(self, network: str, input_ids: np.ndarray) -> dict[str, np.ndarray]:
        self._maybe_fail(network, input_ids)
        self.encoded.append(input_ids)
        phase = len(network) - len("text_encoder")
        frequencies = np.arange(1, HIDDEN + 1) / (7 + np.arange(LAYERS)[::-1, None])
        layers = np.sin(input_ids[:, None, :, None] * frequencies[None, :, None] + phase)
        layers = layers.astype(np.float32)
        if self.poison_token is not None:
            layers[(input_ids == self.poison_token).any(axis=1)] = np.nan
        return {"last_hidden_state": layers[:, -1], "hidden_states": layers}

    def _denoise(
        self, network: str, sample: np.ndarray, timestep: np.ndarray, **told: np.ndarray
    ) -> dict[str, np.ndarray]:
        self.is_entered.set()
        self.gate.wait()
        if sample.any():
            self.step_rows.append(len(sample))
            self.step_networks.append(network)
            self.step_inputs.append(set(told))
        self._maybe_fail(network, sample)
        residual = told.pop("down_block_res_sample_0", None)
        out = np.empty_like(sample[:, :4])
        for row in range(len(sample)):
            bias = np.float32(len(network) - len("unet"))
            for index, name in enumerate(sorted(told)):
                values = told[name][row]
                weights = np.arange(1, values.shape[-1] + 1) * (1 + index)
                bias += np.float32((values * weights).mean())
            given = sample[row, :4] + sample[row, 4:].sum(axis=0)
            if residual is not None:
                given = given + residual[row].mean(axis=0)
            out[row] = np.sin(given * (1 + bias) + timestep[row] / 200 + bias)
        return {"out_sample": out}

    def _control(
        self,
        network: str,
        sample: np.ndarray,
        timestep: np.ndarray,
        controlnet_cond: np.ndarray,
        conditioning_scale: np.ndarray,
        **told: np.ndarray,
    ) -> dict[str, np.ndarray]:
        self._maybe_fail(network, sample)
        assert "encoder_hidden_states" in told
        small = controlnet_cond[:, :, ::FACTOR, ::FACTOR]
        phase = (timestep / 100 + len(network))[:, None, None, None]
        seen = np.sin(sample[:, :3] + small + phase)
        scale = conditioning_scale[:, None, None, None]
        return {"down_block_res_sample_0": (scale * seen).astype(np.float32)}

    def _decode(self, network: str, latent_sample: np.ndarray) -> dict[str, np.ndarray]:
        if latent_sample.any():
            self.decode_gate.wait()
        self._maybe_fail(network, latent_sample)
        pixels = latent_sample[:, :3].repeat(FACTOR, axis=2).repeat(FACTOR, axis=3)
        return {"sample": np.tanh(pixels)}

    def _encode_picture(self, network: str, sample: np.ndarray) -> dict[str, np.ndarray]:
        if sample.any():
            self.decode_gate.wait()
            self.num_pictures_encoded += 1
        self._maybe_fail(network, sample)
        small = sample[:, :, ::FACTOR, ::FACTOR]
        mean = np.concatenate([small, small.mean(axis=1, keepdims=True)], axis=1)
        return {"latent_parameters": np.concatenate([mean, mean - 3], axis=1)}

    def _check(self, network: str, clip_input: np.ndarray) -> dict[str, np.ndarray]:
        self._maybe_fail(network, clip_input)
        limit = np.inf if self.nsfw_above is None else self.nsfw_above
        found = clip_input.mean(axis=(1, 2, 3)) > limit
        return {"has_nsfw_concept": found.astype(np.float32)}

    def _maybe_fail(self, network: str, values: np.ndarray) -> None:
        error = self.fail_next.pop(network, None) or self.away.get(network)
        if error is None and values.any():
            error = self.fail_always.get(network)
        if error is not None:
            raise error
