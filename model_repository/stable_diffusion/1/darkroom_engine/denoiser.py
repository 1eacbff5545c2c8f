"""The denoiser, and the ControlNets that have a say in it."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from darkroom_engine.batch import Row, StepBatch, stack_conditioning
from darkroom_engine.errors import NetworkFailed
from darkroom_engine.manifest import Manifest
from darkroom_engine.networks import Conditioning, Shape
from darkroom_engine.request import ImageRequest
from darkroom_engine.steady import SteadyNetworks

Array = NDArray[np.float32]

_MAX_PERIOD = 10_000.0
_W_SCALE = 1000.0


class Denoiser:
    """Predicts noise for a batch, as the checkpoint's family does it."""

    def __init__(self, manifest: Manifest, networks: SteadyNetworks) -> None:
        self._record = manifest.denoiser
        self._controlnets = manifest.controlnets
        self._num_loras = len(manifest.loras)
        self._scale_factor = manifest.vae_scale_factor
        self._networks = networks
        self._blank: Conditioning = {}

    def network_of(self, replaced: Mapping[str, str]) -> str:
        """Its network's name, where a variant may have another."""
        return replaced.get(self._record.network, self._record.network)

    def sizes(self, request: ImageRequest, *, is_negative: bool) -> Conditioning:
        """What it is told of a request besides the prompt."""
        conditioning: Conditioning = {}
        if self._record.time_ids:
            numbers: list[float] = []
            is_rated = "aesthetic_score" in self._record.time_ids
            for name in self._record.time_ids:
                value = getattr(request, name)
                if is_negative and name == "aesthetic_score":
                    value = request.negative_aesthetic_score
                elif is_negative and is_rated and name == "crops_coords_top_left":
                    # diffusers' default for the refiner, whatever the crop of the positive side.
                    value = (0, 0)
                numbers += value if isinstance(value, tuple) else (value,)
            conditioning["time_ids"] = np.array(numbers, np.float32)
        if size := self._record.guidance_embedding_size:
            conditioning["timestep_cond"] = guidance_embedding(request.guidance_scale - 1, size)
        return conditioning

    def predict(self, batch: StepBatch) -> Array:
        """The network's outputs (R, C, h, w), of the batch's rows in their order."""
        rows, latents, timesteps = batch.rows, batch.latents(), batch.timesteps()
        inputs = {
            self._record.sample: _with_extra_channels(rows, latents),
            "timestep": timesteps,
            **stack_conditioning([row.conditioning for row in rows]),
            **self._lora_scale(rows),
            **self._residuals(rows, latents, timesteps),
        }
        network = batch.samples[0].group.network
        return self._networks.run(network, inputs, [self._record.output])[0]

    def rehearse(self, conditioning: Conditioning, shape: Shape, timeout_s: float) -> None:
        """Make the first calls of the ControlNets; for the denoiser's, see `rehearse_network`."""
        self._blank = {
            **{name: np.array(row) for name, row in conditioning.items()},
            **self._blank_sizes(),
        }
        _, height, width = shape
        factor = self._scale_factor
        inputs = _for_controlnet(
            latents=np.zeros((1, *shape), np.float32),
            timesteps=np.zeros(1, np.float32),
            conditioning=self._stacked_blank(1),
            images=np.zeros((1, 3, factor * height, factor * width), np.float32),
            scales=np.zeros(1, np.float32),
        )
        for network in self._controlnets.values():
            names = [residual.name for residual in self._record.residuals]
            made = self._networks.first_run(network, inputs, names, timeout_s)
            for residual, array in zip(self._record.residuals, made, strict=True):
                if array.shape != (1, *residual.shape(shape)):
                    raise NetworkFailed(network, f"made {residual.name} of {array.shape}")

    def rehearse_network(self, network: str, shape: Shape, timeout_s: float) -> None:
        """Make a denoiser's first call.

        Raises:
            NetworkFailed: it fails, or makes something of another shape.
        """
        inputs = self._blank_inputs(1, shape)
        (made,) = self._networks.first_run(network, inputs, [self._record.output], timeout_s)
        if made.shape != (1, *shape):
            raise NetworkFailed(network, f"made {made.shape} of {(1, *shape)}")

    def predict_blank(self, num_rows: int, shape: Shape) -> None:
        """A call of that size whose output nobody needs."""
        inputs = self._blank_inputs(num_rows, shape)
        self._networks.run(self._record.network, inputs, [self._record.output])

    def _blank_inputs(self, num_rows: int, shape: Shape) -> dict[str, Array]:
        channels, height, width = shape
        size = (num_rows, channels + self._record.extra_channels, height, width)
        return {
            self._record.sample: np.zeros(size, np.float32),
            "timestep": np.zeros(num_rows, np.float32),
            **self._stacked_blank(num_rows),
        }

    def _stacked_blank(self, num_rows: int) -> dict[str, Array]:
        return {name: np.stack([row] * num_rows) for name, row in self._blank.items()}

    def _blank_sizes(self) -> Conditioning:
        record = self._record
        blank: Conditioning = {}
        if record.time_ids:
            num_ids = sum(1 if name == "aesthetic_score" else 2 for name in record.time_ids)
            blank["time_ids"] = np.zeros(num_ids, np.float32)
        if record.guidance_embedding_size:
            blank["timestep_cond"] = np.zeros(record.guidance_embedding_size, np.float32)
        return blank

    def _lora_scale(self, rows: Sequence[Row]) -> dict[str, Array]:
        if all(row.sample.lora_scale is None for row in rows):
            return {}
        none = np.zeros(self._num_loras, np.float32)
        scales = [row.sample.lora_scale for row in rows]
        return {"lora_scale": np.stack([none if scale is None else scale for scale in scales])}

    def _residuals(self, rows: Sequence[Row], latents: Array, timesteps: Array) -> dict[str, Array]:
        """The sum of what the ControlNets say at this step, by input name; nothing if none does.

        A network is asked once for all rows that use it, however many requests they are of.
        """
        asked = _askers(rows)
        if not asked:
            return {}
        shape = rows[0].sample.latent_shape
        totals = {
            residual.name: np.zeros((len(rows), *residual.shape(shape)), np.float32)
            for residual in self._record.residuals
        }
        for (name, _), askers in asked.items():
            chosen = [asker.row for asker in askers]
            inputs = _for_controlnet(
                latents=latents[chosen],
                timesteps=timesteps[chosen],
                conditioning=stack_conditioning([rows[index].conditioning for index in chosen]),
                images=np.stack([asker.image for asker in askers]),
                scales=np.array([asker.scale for asker in askers], np.float32),
            )
            made = self._networks.run(self._controlnets[name], inputs, list(totals))
            for total, array in zip(totals.values(), made, strict=True):
                total[chosen] += array
        return totals


class _Asker(NamedTuple):
    """A row that a ControlNet has a say in."""

    row: int
    image: Array
    scale: float


def _askers(rows: Sequence[Row]) -> dict[tuple[str, int], list[_Asker]]:
    """For each ControlNet's name, and its first, second, ... use in a request, the rows of it."""
    asked: dict[tuple[str, int], list[_Asker]] = defaultdict(list)
    for index, row in enumerate(rows):
        num_uses: dict[str, int] = defaultdict(int)
        for number in row.sample.active_controls:
            control = row.sample.job.request.controls[number]
            image = row.sample.control_images[number]
            asked[control.name, num_uses[control.name]].append(_Asker(index, image, control.scale))
            num_uses[control.name] += 1
    return asked


def _for_controlnet(
    *, latents: Array, timesteps: Array, conditioning: Conditioning, images: Array, scales: Array
) -> dict[str, Array]:
    # An embedded guidance is the denoiser's alone.
    told = {name: array for name, array in conditioning.items() if name != "timestep_cond"}
    return {
        "sample": latents,
        "timestep": timesteps,
        **told,
        "controlnet_cond": images,
        "conditioning_scale": scales,
    }


def guidance_embedding(w: float, size: int) -> Array:
    """(size,): equation 10's w of Luo et al. 2023 (arXiv:2310.04378) as sines, as diffusers has it.

    In float32, in which the network was trained with it.
    """
    half = size // 2
    rates = np.exp(
        np.arange(half, dtype=np.float32) * -np.float32(np.log(_MAX_PERIOD) / (half - 1))
    )
    angles = np.float32(w * _W_SCALE) * rates
    embedding = np.concatenate([np.sin(angles), np.cos(angles)]).astype(np.float32)
    return np.pad(embedding, (0, size - 2 * half))


def _with_extra_channels(rows: Sequence[Row], latents: Array) -> Array:
    extra = [row.sample.extra_channels for row in rows]
    if all(channels is None for channels in extra):
        return latents
    return np.concatenate([latents, np.stack([c for c in extra if c is not None])], axis=1)
