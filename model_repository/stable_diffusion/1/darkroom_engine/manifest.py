"""The birth certificate of a model repository, as the engine reads it."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

FORMAT = 4
BACKENDS = ("python", "onnxruntime", "tensorrt", "torch")
NATIVE_BACKENDS = ("onnxruntime", "tensorrt")
"""Those of Triton itself; others are programs of ours, that fill in what a call leaves out."""
VAE_DECODER = "vae_decoder"
VAE_ENCODER = "vae_encoder"


class ManifestError(Exception):
    """The repository is not one that this engine can serve; the text says what is wrong."""


@dataclass(frozen=True)
class NetworkRecord:
    """One exported network."""

    backend: str
    """What runs it."""
    files: Mapping[str, str]
    """SHA-256 by path, relative to the repository."""
    outputs: list[str]
    max_batch_size: int
    error: float
    tolerance: float


@dataclass(frozen=True)
class Residual:
    """One of the denoiser's inputs that ControlNets feed."""

    name: str
    channels: int
    divisor: int
    """Of the latents' height and width."""

    def shape(self, latent_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        _, height, width = latent_shape
        # A convolution of stride 2 rounds up.
        return (self.channels, -(-height // self.divisor), -(-width // self.divisor))


@dataclass(frozen=True)
class DenoiserRecord:
    """How the network is called that predicts noise: a UNet, or a transformer."""

    network: str
    sample: str
    """The input that takes the latents."""
    output: str
    extra_channels: int
    """Of a mask and the latents of a masked picture, which a checkpoint for inpainting takes."""
    time_ids: tuple[str, ...]
    """The fields of a request that its input `time_ids` holds; empty if it has no such input."""
    guidance_embedding_size: int
    """Of its input `timestep_cond`; 0 if it has none, and guidance takes a second row."""
    residuals: tuple[Residual, ...]

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "DenoiserRecord":
        residuals = tuple(Residual(**record) for record in config["residuals"])
        return cls(**{**config, "time_ids": tuple(config["time_ids"]), "residuals": residuals})


@dataclass(frozen=True)
class Manifest:
    """What was exported, from what, and how far it is from PyTorch."""

    directory: Path
    name: str
    family: str
    precision: str
    sha256: str
    """Of the manifest itself, hence of all it names: it identifies the served model."""
    networks: Mapping[str, NetworkRecord]
    latent_channels: int
    vae_scale_factor: int
    vae_scaling_factor: float
    vae_shift_factor: float
    preview_matrix: NDArray[np.float32]
    """(C, 3): with `preview_bias`, (3,), the colours in [-1, 1] that a latent of the denoising loop
    is about to become, latents @ matrix + bias."""
    preview_bias: NDArray[np.float32]
    noise_schedule: Mapping[str, Any]
    solver: Mapping[str, Any]
    text: Mapping[str, Any]
    """How prompts become conditioning, see `PromptEncoder`."""
    denoiser: DenoiserRecord
    controlnets: Mapping[str, str]
    """The network of each ControlNet by the name that requests give it."""
    loras: tuple[str, ...]
    """The adapters that requests may mix, in the order in which the denoiser takes their scales."""
    lora_files: Mapping[str, Mapping[str, str]]
    """Of each adapter: SHA-256 by path, relative to the repository."""
    variants: Mapping[str, Mapping[str, str]]
    """By name: which network takes the place of which."""
    safety_checker: Mapping[str, Any] | None
    limits: Mapping[str, Any]

    @property
    def has_encoder(self) -> bool:
        """Whether pictures can become latents."""
        return VAE_ENCODER in self.networks

    @classmethod
    def load(cls, path: Path) -> "Manifest":
        """Read a manifest and check that the repository is the one it certifies.

        Raises:
            ManifestError: a file is missing, unverified or not the one that was verified.
        """
        try:
            raw = path.read_bytes()
        except FileNotFoundError:
            raise ManifestError(f"{path} is missing: this is no exported repository") from None
        try:
            document = json.loads(raw)
            if document["format"] != FORMAT:
                raise ManifestError(
                    f"{path}: format {document['format']}, but this engine reads {FORMAT}; "
                    "export the checkpoint again"
                )
            manifest = cls(
                directory=path.parent,
                name=document["name"],
                family=document["family"],
                precision=document["precision"],
                sha256=hashlib.sha256(raw).hexdigest(),
                networks={
                    name: NetworkRecord(
                        backend=record["backend"],
                        files=record["files"],
                        outputs=list(record["outputs"]),
                        max_batch_size=record["max_batch_size"],
                        error=record["verification"]["error"],
                        tolerance=record["verification"]["tolerance"],
                    )
                    for name, record in document["networks"].items()
                },
                latent_channels=document["latents"]["channels"],
                vae_scale_factor=document["latents"]["vae_scale_factor"],
                vae_scaling_factor=document["latents"]["vae_scaling_factor"],
                vae_shift_factor=document["latents"]["vae_shift_factor"],
                preview_matrix=np.array(document["preview"]["matrix"], np.float32),
                preview_bias=np.array(document["preview"]["bias"], np.float32),
                noise_schedule=document["noise_schedule"],
                solver=document["solver"],
                text=document["text"],
                denoiser=DenoiserRecord.from_config(document["denoiser"]),
                controlnets={
                    name: record["network"] for name, record in document["controlnets"].items()
                },
                loras=tuple(sorted(document["loras"])),
                lora_files={
                    name: record.get("files", {}) for name, record in document["loras"].items()
                },
                variants=document["variants"],
                safety_checker=document["safety_checker"],
                limits=document["limits"],
            )
        except json.JSONDecodeError as error:
            raise ManifestError(f"{path} is not JSON: {error}") from None
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ManifestError(f"{path}: {error} is missing or malformed") from None
        manifest._check()
        return manifest

    def _check(self) -> None:
        for name, array, shape in (
            ("matrix", self.preview_matrix, (self.latent_channels, 3)),
            ("bias", self.preview_bias, (3,)),
        ):
            if array.shape != shape or not np.isfinite(array).all():
                raise ManifestError(
                    f"preview: {name} is {array.tolist()}, not finite numbers of shape {shape}"
                )
        for name in self._named_networks():
            if name not in self.networks:
                raise ManifestError(f"{name}: named, but not among the networks")
        for name, network in self.networks.items():
            if network.backend not in BACKENDS:
                raise ManifestError(
                    f"{name}: backend {network.backend!r} is not known to this engine, but "
                    f"{', '.join(BACKENDS)} are"
                )
            # Written so that an error that is not a number counts as unverified too.
            if not network.error <= network.tolerance:
                raise ManifestError(
                    f"{name}: measured error {network.error} is not within its tolerance "
                    f"{network.tolerance}; export it again"
                )
            self._check_files(name, network.files)
        for name, files in self.lora_files.items():
            self._check_files(name, files)

    def _check_files(self, name: str, files: Mapping[str, str]) -> None:
        for file, expected in files.items():
            path = self.directory / file
            if not path.is_file():
                raise ManifestError(f"{name}: {path} is missing")
            with path.open("rb") as stream:
                actual = hashlib.file_digest(stream, "sha256").hexdigest()
            if actual != expected:
                raise ManifestError(
                    f"{name}: {path} is not the file that was verified "
                    f"(sha256 {actual[:12]}, manifest {expected[:12]})"
                )

    def _named_networks(self) -> Iterator[str]:
        yield self.denoiser.network
        yield VAE_DECODER
        yield from (encoder["network"] for encoder in self.text["encoders"])
        yield from self.controlnets.values()
        for replaced in self.variants.values():
            yield from replaced
            yield from replaced.values()
        if self.safety_checker:
            yield self.safety_checker["network"]
