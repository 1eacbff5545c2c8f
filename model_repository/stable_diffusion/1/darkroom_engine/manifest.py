"""The birth certificate of a model repository, as the engine reads it."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

FORMAT = 2


class ManifestError(Exception):
    """The repository is not one that this engine can serve; the text says what is wrong."""


@dataclass(frozen=True)
class NetworkRecord:
    """One exported network."""

    files: Mapping[str, str]
    """SHA-256 by path, relative to the repository."""
    outputs: list[str]
    max_batch_size: int
    error: float
    tolerance: float


@dataclass(frozen=True)
class Manifest:
    """What was exported, from what, and how far it is from PyTorch."""

    directory: Path
    name: str
    family: str
    sha256: str
    """Of the manifest itself, hence of all it names: it identifies the served model."""
    networks: Mapping[str, NetworkRecord]
    latent_channels: int
    vae_scale_factor: int
    vae_scaling_factor: float
    preview_matrix: NDArray[np.float32]
    """(C, 3): with `preview_bias`, (3,), the colours in [-1, 1] that a latent of the denoising loop
    is about to become, latents @ matrix + bias."""
    preview_bias: NDArray[np.float32]
    noise_schedule: Mapping[str, Any]
    solver: Mapping[str, Any]
    tokenizer: Mapping[str, Any]
    limits: Mapping[str, Any]

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
                sha256=hashlib.sha256(raw).hexdigest(),
                networks={
                    name: NetworkRecord(
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
                preview_matrix=np.array(document["preview"]["matrix"], np.float32),
                preview_bias=np.array(document["preview"]["bias"], np.float32),
                noise_schedule=document["noise_schedule"],
                solver=document["solver"],
                tokenizer=document["tokenizer"],
                limits=document["limits"],
            )
        except json.JSONDecodeError as error:
            raise ManifestError(f"{path} is not JSON: {error}") from None
        except (KeyError, TypeError, ValueError) as error:
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
        for name, network in self.networks.items():
            # Written so that an error that is not a number counts as unverified too.
            if not network.error <= network.tolerance:
                raise ManifestError(
                    f"{name}: measured error {network.error} is not within its tolerance "
                    f"{network.tolerance}; export it again"
                )
            for file, expected in network.files.items():
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
