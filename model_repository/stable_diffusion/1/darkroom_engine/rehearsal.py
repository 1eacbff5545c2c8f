"""The first call of every network: whether it can be called, and makes what it should."""

from collections.abc import Callable, Mapping

from darkroom_engine.denoiser import Denoiser
from darkroom_engine.manifest import Manifest
from darkroom_engine.networks import Shape
from darkroom_engine.prompts import PromptEncoder
from darkroom_engine.safety import SafetyChecker, SafetyMode
from darkroom_engine.steady import SteadyNetworks
from darkroom_engine.vae import Vae

TIMEOUT_S = 600.0


def rehearse(
    manifest: Manifest,
    networks: SteadyNetworks,
    prompts: PromptEncoder,
    denoiser: Denoiser,
    *,
    vae: Vae,
    safety_checker: SafetyChecker,
    shape: Shape,
    is_given_up: Callable[[], bool],
) -> None:
    """Wait for all networks, and call each with little, latents of `shape` where it takes some.

    It is by these calls that a network will be tried when it has failed.

    Raises:
        NetworkFailed: one is not there, fails, or makes something of another shape.
    """
    checker = manifest.safety_checker
    unused = checker["network"] if checker and safety_checker.mode is SafetyMode.OFF else None
    needed = [name for name in manifest.networks if name != unused]
    networks.wait_until_ready(needed, TIMEOUT_S, is_given_up)
    replacements: list[Mapping[str, str]] = [{}, *manifest.variants.values()]
    for replaced in replacements:
        for network, inputs, outputs in prompts.probe_calls:
            networks.first_run(replaced.get(network, network), inputs, outputs, TIMEOUT_S)
    denoiser.rehearse(prompts.encode(""), shape, TIMEOUT_S)
    for network in dict.fromkeys(map(denoiser.network_of, replacements)):
        denoiser.rehearse_network(network, shape, TIMEOUT_S)
    vae.rehearse(shape, TIMEOUT_S)
    safety_checker.rehearse(TIMEOUT_S)
