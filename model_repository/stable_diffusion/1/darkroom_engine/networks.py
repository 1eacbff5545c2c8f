"""The seam to the networks: the only file that knows how they are run."""

import time
from collections.abc import Callable
from types import ModuleType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from darkroom_engine.errors import NetworkFailed, NotYetAllowed
from darkroom_engine.manifest import Manifest
from darkroom_engine.sample import Conditioning

Array = NDArray[Any]


class Networks(Protocol):
    """The three networks of latent diffusion. Each call raises NetworkFailed if it cannot answer.

    `decode` may be called while another thread is in one of the other calls.
    """

    def wait_until_ready(self, timeout_s: float, is_given_up: Callable[[], bool]) -> None:
        """Return when all networks can be called; NetworkFailed names the one that cannot.

        `is_given_up` is asked again and again, and ends the waiting at once.
        """

    def encode(self, input_ids: NDArray[np.int64], clip_skip: int) -> Conditioning:
        """Token ids (B, 77) to conditioning inputs of the UNet, each (B, 77, ...).

        `clip_skip` of the text encoder's last layers are left out, but for the last normalisation.
        """

    def denoise(
        self, sample: NDArray[np.float32], timestep: NDArray[np.float32], conditioning: Conditioning
    ) -> NDArray[np.float32]:
        """Sample (R, C, H, W), timestep (R,), conditioning (R, ...) to output (R, C, H, W).

        The hidden states of the conditioning may have any length, in multiples of 77.
        """

    def decode(self, latents: NDArray[np.float32]) -> NDArray[np.float32]:
        """Latents (B, C, H, W) as the VAE scales them to pixels (B, 3, 8H, 8W) in [-1, 1]."""


class TritonNetworks:
    """Networks that are Triton models of any backend, called by BLS from the model `caller`."""

    def __init__(self, pb_utils: ModuleType, caller: str, manifest: Manifest) -> None:
        self._pb_utils = pb_utils
        self._caller = caller
        self._manifest = manifest

    def wait_until_ready(self, timeout_s: float, is_given_up: Callable[[], bool]) -> None:
        # Triton refuses BLS while the server starts, and while the calling model itself loads.
        # It tells nobody when that is over, so that there is nothing to do but to ask again.
        give_up_at = time.monotonic() + timeout_s
        for model in (*self._manifest.networks, self._caller):
            while not self._is_ready(model):
                if is_given_up() or time.monotonic() > give_up_at:
                    raise NetworkFailed(model, f"not ready within {timeout_s:g} s")
                time.sleep(0.05)

    def encode(self, input_ids: NDArray[np.int64], clip_skip: int) -> Conditioning:
        inputs = {"input_ids": input_ids}
        if clip_skip:
            # (B, layers + 1, 77, C), the last of them `last_hidden_state`.
            layers = self._run("text_encoder", inputs, "hidden_states")
            hidden = layers[:, -(clip_skip + 1)]
        else:
            hidden = self._run("text_encoder", inputs, "last_hidden_state")
        return {"encoder_hidden_states": hidden}

    def denoise(
        self, sample: NDArray[np.float32], timestep: NDArray[np.float32], conditioning: Conditioning
    ) -> NDArray[np.float32]:
        # Triton counts the batch apart from a tensor's own dimensions, of which timestep has one.
        inputs = {"sample": sample, "timestep": timestep[:, None], **conditioning}
        return self._run("unet", inputs, "out_sample")

    def decode(self, latents: NDArray[np.float32]) -> NDArray[np.float32]:
        return self._run("vae_decoder", {"latent_sample": latents}, "sample")

    def _is_ready(self, model: str) -> bool:
        try:
            return bool(self._pb_utils.is_model_ready(model))
        except self._pb_utils.TritonModelException:
            return False

    def _run(self, network: str, inputs: dict[str, Array], output: str) -> NDArray[np.float32]:
        pb_utils = self._pb_utils
        request = pb_utils.InferenceRequest(
            model_name=network,
            requested_output_names=[output],
            inputs=[
                pb_utils.Tensor(name, np.ascontiguousarray(array)) for name, array in inputs.items()
            ],
        )
        try:
            response = request.exec()
        except pb_utils.TritonModelException as error:
            raise _failure(network, str(error)) from error
        if response.has_error():
            raise _failure(network, response.error().message())
        (tensor,) = response.output_tensors()
        array: NDArray[np.float32] = tensor.as_numpy()
        return array


def _failure(network: str, problem: str) -> NetworkFailed:
    # When a new instance of the calling model takes the place of an old one, Triton says that the
    # model is ready while the new one is still being loaded.
    if "BLS is only supported during" in problem:
        return NotYetAllowed(network, problem)
    # Triton says so while it starts, which is waited for, and then only when it stops: it lets no
    # request in any more, and waits for those that are here.
    return NetworkFailed(network, problem, is_final="Server not ready" in problem)
