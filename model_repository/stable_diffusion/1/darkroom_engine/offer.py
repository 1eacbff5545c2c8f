"""What a checkpoint on this server offers: the limits of requests, and how it describes itself."""

from typing import Any

from darkroom_engine.config import EngineConfig
from darkroom_engine.manifest import Manifest
from darkroom_engine.request import MODES, OUTPUT_FORMATS, Limits


def limits_of(manifest: Manifest, samplers: tuple[str, ...]) -> Limits:
    """The manifest's limits, and what follows from the networks that there are."""
    denoiser = manifest.denoiser
    modes: tuple[str, ...] = MODES if manifest.has_encoder else MODES[:1]
    if denoiser.extra_channels:
        modes = ("inpaint",)
    elif "aesthetic_score" in denoiser.time_ids:
        # A refiner, which has learned nothing of the noisiest levels.
        modes = MODES[1:]
    return Limits(
        samplers=samplers,
        **manifest.limits,
        latent_channels=manifest.latent_channels,
        vae_scale_factor=manifest.vae_scale_factor,
        modes=modes,
        size_fields=denoiser.time_ids,
        controlnets=tuple(manifest.controlnets),
        loras=manifest.loras,
        variants=tuple(manifest.variants),
    )


def describe(manifest: Manifest, limits: Limits, config: EngineConfig) -> dict[str, Any]:
    """All that a client needs to make requests that are taken, as JSON has it."""
    named = ("modes", "samplers", "controlnets", "loras", "variants", "size_fields")
    return {
        "name": manifest.name,
        "family": manifest.family,
        "precision": manifest.precision,
        "backends": sorted({network.backend for network in manifest.networks.values()}),
        "engine": manifest.sha256[:12],
        **{name: list(getattr(limits, name)) for name in named},
        "limits": {**manifest.limits, "max_queue_size": config.max_queue_size},
        "output_formats": list(OUTPUT_FORMATS),
        "safety_checker": config.safety_checker,
    }
