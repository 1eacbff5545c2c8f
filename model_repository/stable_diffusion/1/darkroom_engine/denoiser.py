"""The denoiser, and the ControlNets that have a say in it."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from darkroom_engine.arrays import Array
from darkroom_engine.batch import Row, StepBatch, stack_conditioning
from darkroom_engine.errors import NetworkFailed
from darkroom_engine.manifest import NATIVE_BACKENDS, Manifest
from darkroom_engine.networks import Conditioning, Shape
from darkroom_engine.request import ImageRequest
from darkroom_engine.steady import SteadyNetworks

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
        self._arrays = networks.arrays
        # Triton's own backends take no call that leaves an input out.
        runner = manifest.networks[manifest.denoiser.network].backend
        self._fills_residuals = runner in NATIVE_BACKENDS
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
            self._record.sample: self._with_extra_channels(rows, latents),
            "timestep": timesteps,
            **stack_conditioning([row.conditioning for row in rows], self._arrays),
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
        zeros = self._arrays.zeros
        _, height, width = shape
        factor = self._scale_factor
        inputs = _for_controlnet(
            latents=zeros((1, *shape)),
            timesteps=zeros((1,)),
            conditioning=self._stacked_blank(1),
            images=zeros((1, 3, factor * height, factor * width)),
            scales=zeros((1,)),
        )
        for network in self._controlnets.values():
            names = [residual.name for residual in self._record.residuals]
            made = self._networks.first_run(network, inputs, names, timeout_s)
            for residual, array in zip(self._record.residuals, made, strict=True):
                if tuple(array.shape) != (1, *residual.shape(shape)):
                    raise NetworkFailed(network, f"made {residual.name} of {tuple(array.shape)}")

    def rehearse_network(self, network: str, shape: Shape, timeout_s: float) -> None:
        """Make a denoiser's first call.

        Raises:
            NetworkFailed: it fails, or makes something of another shape.
        """
        inputs = self._blank_inputs(1, shape)
        (made,) = self._networks.first_run(network, inputs, [self._record.output], timeout_s)
        if tuple(made.shape) != (1, *shape):
            raise NetworkFailed(network, f"made {tuple(made.shape)} of {(1, *shape)}")

    def predict_blank(self, num_rows: int, shape: Shape) -> None:
        """A call of that size, whose output nobody needs; it is done when this returns."""
        inputs = self._blank_inputs(num_rows, shape)
        (made,) = self._networks.run(self._record.network, inputs, [self._record.output])
        self._arrays.to_host(made)

    def _blank_inputs(self, num_rows: int, shape: Shape) -> dict[str, Array]:
        channels, height, width = shape
        zeros = self._arrays.zeros
        return {
            self._record.sample: zeros(
                (num_rows, channels + self._record.extra_channels, height, width)
            ),
            "timestep": zeros((num_rows,)),
            **self._stacked_blank(num_rows),
            **(self._no_residuals(num_rows, shape) if self._fills_residuals else {}),
        }

    def _stacked_blank(self, num_rows: int) -> dict[str, Array]:
        return {
            name: self._arrays.from_host(np.stack([row] * num_rows))
            for name, row in self._blank.items()
        }

    def _blank_sizes(self) -> Conditioning:
        record = self._record
        blank: Conditioning = {}
        if record.time_ids:
            num_ids = sum(1 if name == "aesthetic_score" else 2 for name in record.time_ids)
            blank["time_ids"] = np.zeros(num_ids, np.float32)
        if record.guidance_embedding_size:
            blank["timestep_cond"] = np.zeros(record.guidance_embedding_size, np.float32)
        return blank

    def _lora_scale(self, rows: Sequence[Row]) -> dict[str, NDArray[np.float32]]:
        """On the host in any case: what runs the network decides by it what it needs."""
        if all(row.sample.lora_scale is None for row in rows):
            return {}
        none = np.zeros(self._num_loras, np.float32)
        scales = [row.sample.lora_scale for row in rows]
        return {"lora_scale": np.stack([none if scale is None else scale for scale in scales])}

    def _with_extra_channels(self, rows: Sequence[Row], latents: Array) -> Array:
        extra = [row.sample.extra_channels for row in rows]
        if all(channels is None for channels in extra):
            return latents
        channels = self._arrays.stack([c for c in extra if c is not None])
        return self._arrays.concatenate([latents, channels], axis=1)

    def _residuals(self, rows: Sequence[Row], latents: Array, timesteps: Array) -> dict[str, Array]:
        """The sum of what the ControlNets say at this step, by input name; nothing if none does.

        A network is asked once for all rows that use it, however many requests they are of.
        """
        arrays, shape = self._arrays, rows[0].sample.latent_shape
        asked = _askers(rows)
        if not asked:
            return self._no_residuals(len(rows), shape) if self._fills_residuals else {}
        said: list[dict[str, Array]] = [{} for _ in rows]
        for (name, _), askers in asked.items():
            chosen = [asker.row for asker in askers]
            conditioning = [rows[index].conditioning for index in chosen]
            inputs = _for_controlnet(
                latents=arrays.stack([latents[index] for index in chosen]),
                timesteps=arrays.stack([timesteps[index] for index in chosen]),
                conditioning=stack_conditioning(conditioning, arrays),
                images=arrays.stack([asker.image for asker in askers]),
                scales=arrays.from_host(np.array([asker.scale for asker in askers], np.float32)),
            )
            names = [residual.name for residual in self._record.residuals]
            made = self._networks.run(self._controlnets[name], inputs, names)
            for output, feature_maps in zip(names, made, strict=True):
                for row, feature_map in zip(chosen, feature_maps, strict=True):
                    before = said[row].get(output)
                    said[row][output] = feature_map if before is None else before + feature_map
        totals = {}
        for residual in self._record.residuals:
            nothing = arrays.zeros(residual.shape(shape))
            totals[residual.name] = arrays.stack([it.get(residual.name, nothing) for it in said])
        return totals

    def _no_residuals(self, num_rows: int, shape: Shape) -> dict[str, Array]:
        return {
            residual.name: self._arrays.zeros((num_rows, *residual.shape(shape)))
            for residual in self._record.residuals
        }


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


def guidance_embedding(w: float, size: int) -> NDArray[np.float32]:
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
