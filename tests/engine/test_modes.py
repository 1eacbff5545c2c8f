"""Pictures that start from pictures, ControlNets, adapters and variants, in one running batch."""

import copy
import json
import random
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_harness import WAIT_S, Harness
from fake_device import DeviceNetworks
from fake_networks import FakeNetworks
from PIL import Image

from darkroom_engine import EngineConfig, EngineError, InvalidRequest, Manifest, NetworkFailed

RESIDUAL = {"name": "down_block_res_sample_0", "channels": 3, "divisor": 1}
SIZE = {"width": 64, "height": 64}


def picture(seed: int = 0, size: tuple[int, int] = (64, 64), mode: str = "RGB") -> bytes:
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), np.uint8)).convert(mode)
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def mask() -> bytes:
    """White on the left half."""
    levels = np.zeros((64, 64), np.uint8)
    levels[:, :32] = 255
    buffer = BytesIO()
    Image.fromarray(levels).save(buffer, "PNG")
    return buffer.getvalue()


def latents_of(encoded: bytes) -> np.ndarray:
    return np.load(BytesIO(encoded), allow_pickle=False)


@pytest.fixture
def rich(manifest_document: dict[str, Any]) -> dict[str, Any]:
    """A manifest with ControlNets, adapters, a variant and a safety checker."""
    document = copy.deepcopy(manifest_document)
    record = document["networks"]["unet"]
    names = ("controlnet_canny", "controlnet_depth", "unet_watercolor", "text_encoder_watercolor")
    document["networks"] |= dict.fromkeys((*names, "safety_checker"), record)
    document["denoiser"]["residuals"] = [RESIDUAL]
    document["controlnets"] = {
        name: {"network": f"controlnet_{name}"} for name in ("canny", "depth")
    }
    document["loras"] = {"ink": {}, "pixelart": {}}
    document["variants"] = {
        "watercolor": {name: f"{name}_watercolor" for name in ("unet", "text_encoder")}
    }
    document["safety_checker"] = {
        "network": "safety_checker",
        "size": 32,
        "mean": [0.5, 0.5, 0.5],
        "std": [0.25, 0.25, 0.25],
    }
    return document


@pytest.fixture
def make_rich(
    rich: dict[str, Any], repository: Path, networks: FakeNetworks
) -> Callable[..., Harness]:
    (repository / "manifest.json").write_text(json.dumps(rich))
    harnesses = []

    def make(served: FakeNetworks = networks, **config: Any) -> Harness:
        manifest = Manifest.load(repository / "manifest.json")
        harness = Harness(manifest, served, EngineConfig(**{"max_rows": 32, **config}))
        harnesses.append(harness)
        harness.engine.start()
        return harness

    yield make
    networks.gate.set()
    networks.decode_gate.set()
    for harness in harnesses:
        harness.engine.close()


@pytest.fixture
def harness(make_rich: Callable[..., Harness]) -> Harness:
    return make_rich()


CANNY = {"controlnet": ("canny",), "control_image": (picture(5),)}
BOTH = {
    "controlnet": ("canny", "depth"),
    "control_image": (picture(5), picture(6)),
    "controlnet_conditioning_scale": (0.5, 1.5),
    "control_guidance_start": (0.0, 0.25),
    "control_guidance_end": (0.5, 1.0),
}

MIXED: list[dict[str, Any]] = [
    {},
    {"image": picture(1), "strength": 0.6},
    {"image": picture(2), "mask_image": mask(), "strength": 0.9},
    {"image": picture(2), "mask_image": mask()},
    CANNY,
    BOTH,
    BOTH | {"image": picture(3), "strength": 0.4, "guidance_scale": 1.0},
    {"lora": ("ink",), "lora_scale": (0.7,)},
    {"lora": ("pixelart", "ink"), "lora_scale": (0.2, -1.0)},
    {"variant": "watercolor"},
    {"variant": "watercolor", "image": picture(1), "negative_prompt": "blurry"},
    {"denoising_end": 0.5, "output_format": "latent"},
    {"controlnet": ("canny", "canny"), "control_image": (picture(5), picture(7))},
]
SAMPLERS = ("unipc", "euler_ancestral", "dpmpp_2m_sde", "ddim", "lcm", "dpmpp_sde", "euler")
REQUESTS = [
    {
        **SIZE,
        "prompt": f"prompt {n}",
        "seed": n,
        "num_inference_steps": 4 + 3 * n % 11,
        "sampler": SAMPLERS[n % len(SAMPLERS)],
        **fields,
    }
    for n, fields in enumerate(MIXED * 2)
]


@pytest.mark.parametrize("overlap_decode", [0, 1])
def test_mixed_modes_in_one_batch_equal_solo_runs_exactly(
    make_rich: Callable[..., Harness], overlap_decode: int
) -> None:
    harness = make_rich(overlap_decode=overlap_decode)
    solo = [harness.picture(**request) for request in REQUESTS]
    assert len(set(solo)) == len(solo)
    harness.networks.step_rows.clear()

    harness.networks.gate.clear()
    futures = [harness.ask(**request) for request in REQUESTS]
    harness.networks.gate.set()
    together = [future.result(WAIT_S).pictures[0] for future in futures]

    assert solo == together
    assert max(harness.networks.step_rows) > 20


@pytest.mark.parametrize("seed", range(3))
def test_mixed_modes_join_and_leave_at_any_step(
    make_rich: Callable[..., Harness], seed: int
) -> None:
    harness = make_rich(max_rows=7)
    solo = [harness.picture(**request) for request in REQUESTS]
    order = random.Random(seed).sample(range(len(REQUESTS)), len(REQUESTS))

    futures = {n: harness.ask(**REQUESTS[n]) for n in order}

    assert [futures[n].result(WAIT_S).pictures[0] for n in range(len(REQUESTS))] == solo


def test_all_modes_on_a_device_equal_those_on_the_host(make_rich: Callable[..., Harness]) -> None:
    on_host, on_device = make_rich(), make_rich(DeviceNetworks(), max_rows=7)
    expected = [on_host.picture(**request) for request in REQUESTS]

    futures = [on_device.ask(**request) for request in REQUESTS]

    assert [future.result(WAIT_S).pictures[0] for future in futures] == expected


def test_a_starting_picture_shows_the_more_the_less_strength(harness: Harness) -> None:
    request = {"image": picture(1), "num_inference_steps": 20, "guidance_scale": 1.0}
    whole, some = (
        harness.picture(**request, strength=strength, output_format="latent")
        for strength in (1.0, 0.05)
    )
    levels = np.asarray(Image.open(BytesIO(picture(1))), np.float32)[::8, ::8] / 127.5 - 1
    own = 0.18215 * levels.transpose(2, 0, 1)

    def distance(encoded: bytes) -> float:
        return float(np.abs(latents_of(encoded)[:3] - own).mean())

    assert distance(some) < distance(whole)


def test_a_strength_that_leaves_no_step_is_refused(harness: Harness) -> None:
    with pytest.raises(InvalidRequest, match=r"^strength: 0\.01"):
        harness.ask(image=picture(), strength=0.01, num_inference_steps=10)


def test_fewer_steps_are_made_with_less_strength(harness: Harness) -> None:
    harness.picture()
    harness.networks.step_rows.clear()
    request = {"image": picture(), "num_inference_steps": 10, "guidance_scale": 1.0}
    harness.picture(**request, strength=0.3)

    assert harness.networks.step_rows == [1, 1, 1]


def test_inpainting_leaves_what_is_not_masked_alone(harness: Harness) -> None:
    request = {"image": picture(2), "mask_image": mask(), "output_format": "latent"}
    first = latents_of(harness.picture(**request, prompt="one", seed=3))
    other = latents_of(harness.picture(**request, prompt="other", seed=3))

    np.testing.assert_array_equal(first[:, :, 4:], other[:, :, 4:])
    assert np.abs(first[:, :, :4] - other[:, :, :4]).min() > 0


def test_a_picture_is_encoded_once_for_all_pictures_of_its_request(harness: Harness) -> None:
    result = harness.ask(image=picture(), num_images_per_prompt=3).result(WAIT_S)

    assert len(set(result.pictures)) == 3
    assert harness.networks.num_pictures_encoded == 1


def test_nobody_waits_for_the_encoding_of_somebody_elses_picture(harness: Harness) -> None:
    expected = harness.picture(seed=1)
    networks = harness.networks
    networks.decode_gate.clear()
    held = harness.ask(image=picture())
    networks.step_rows.clear()
    other = harness.ask(seed=1)
    give_up_at = time.monotonic() + WAIT_S
    while len(networks.step_rows) < 8:
        assert time.monotonic() < give_up_at

    assert networks.step_rows == [2] * 8
    networks.decode_gate.set()
    assert other.result(WAIT_S).pictures[0] == expected
    assert held.result(WAIT_S).pictures


def test_a_cancel_while_a_picture_is_encoded_frees_its_place(
    make_rich: Callable[..., Harness],
) -> None:
    harness = make_rich(max_queue_size=1)
    harness.picture()
    harness.networks.decode_gate.clear()
    job, future = harness.ask_job(image=picture(), output_format="latent")
    job.cancel()
    with pytest.raises(EngineError, match="cancelled"):
        future.result(WAIT_S)
    # Its place is free, though the encoder is still at it.
    other = harness.ask()
    harness.networks.decode_gate.set()

    assert other.result(WAIT_S).pictures


@pytest.mark.parametrize("overlap_decode", [0, 1])
def test_a_picture_that_cannot_be_encoded_fails_its_request_alone(
    make_rich: Callable[..., Harness], overlap_decode: int
) -> None:
    harness = make_rich(overlap_decode=overlap_decode)
    expected = harness.picture(seed=1)
    harness.networks.fail_always["vae_encoder"] = NetworkFailed("vae_encoder", "no memory")
    failing, other = harness.ask(image=picture()), harness.ask(seed=1)

    with pytest.raises(NetworkFailed, match="vae_encoder failed: no memory"):
        failing.result(WAIT_S)
    assert other.result(WAIT_S).pictures[0] == expected


def test_a_surprise_in_the_encoder_fails_its_request_alone(harness: Harness) -> None:
    harness.picture()
    harness.networks.fail_next["vae_encoder"] = RuntimeError("surprise")
    with pytest.raises(EngineError, match="this is a bug: RuntimeError"):
        harness.ask(image=picture()).result(WAIT_S)

    assert harness.picture()


def test_half_done_latents_go_on_where_they_were_left(harness: Harness) -> None:
    """With a sampler of one step, which remembers nothing, the two halves are the whole."""
    request = {"num_inference_steps": 10, "seed": 4, "sampler": "ddim", "output_format": "latent"}
    whole = harness.picture(**request)
    half = harness.picture(**request, denoising_end=0.5)
    assert latents_of(half).shape == (4, 8, 8)
    rest = harness.picture(**request, image=half, denoising_start=0.5)

    np.testing.assert_allclose(latents_of(rest), latents_of(whole), atol=1e-6)


def test_controlnets_speak_only_from_their_start_to_their_end(harness: Harness) -> None:
    harness.picture()
    harness.networks.step_inputs.clear()
    harness.picture(
        **CANNY, control_guidance_start=(0.25,), control_guidance_end=(0.5,), num_inference_steps=8
    )

    controlled = [RESIDUAL["name"] in names for names in harness.networks.step_inputs]
    assert controlled == [False, False, True, True, False, False, False, False]


@pytest.mark.parametrize("backend", ["onnxruntime", "tensorrt"])
def test_a_network_of_tritons_own_backends_is_told_that_no_controlnet_speaks(
    rich: dict[str, Any],
    make_rich: Callable[..., Harness],
    networks: FakeNetworks,
    repository: Path,
    backend: str,
) -> None:
    requests = [request | {"output_format": "latent"} for request in REQUESTS[:6]]
    expected = [make_rich().picture(**request) for request in requests]
    unet = rich["networks"]["unet"] | {"backend": backend}
    document = rich | {"networks": rich["networks"] | {"unet": unet}}
    (repository / "manifest.json").write_text(json.dumps(document))
    networks.step_inputs.clear()
    harness = make_rich()

    assert [harness.picture(**request) for request in requests] == expected
    assert all(RESIDUAL["name"] in inputs for inputs in networks.step_inputs)


def test_a_scale_of_nothing_is_no_controlnet(harness: Harness) -> None:
    request = {"seed": 2, "output_format": "latent"}
    plain = harness.picture(**request)

    assert harness.picture(**request, **CANNY) != plain
    assert harness.picture(**request, **CANNY, controlnet_conditioning_scale=(0.0,)) == plain


def test_a_failing_controlnet_fails_the_batch_and_no_later_one(harness: Harness) -> None:
    expected = harness.picture(seed=1)
    harness.networks.fail_always["controlnet_canny"] = NetworkFailed("controlnet_canny", "gone")
    with pytest.raises(NetworkFailed, match="controlnet_canny failed: gone"):
        harness.ask(**CANNY).result(WAIT_S)

    assert harness.picture(seed=1) == expected


def test_an_adapter_of_scale_zero_is_none(harness: Harness) -> None:
    request = {"seed": 2, "output_format": "latent"}
    plain = harness.picture(**request)
    harness.networks.step_inputs.clear()

    assert harness.picture(**request, lora=("ink",), lora_scale=(0.0,)) == plain
    assert "lora_scale" not in set().union(*harness.networks.step_inputs)
    assert harness.picture(**request, lora=("ink",)) != plain


def test_a_variant_runs_its_own_networks(harness: Harness) -> None:
    plain = harness.picture(seed=2)
    harness.networks.step_networks.clear()

    assert harness.picture(seed=2, variant="watercolor") != plain
    assert set(harness.networks.step_networks) == {"unet_watercolor"}


def test_an_inpainting_checkpoint_is_shown_mask_and_masked_picture(
    manifest_document: dict[str, Any], repository: Path, networks: FakeNetworks
) -> None:
    document = copy.deepcopy(manifest_document)
    document["denoiser"]["extra_channels"] = 5
    (repository / "manifest.json").write_text(json.dumps(document))
    harness = Harness(Manifest.load(repository / "manifest.json"), networks, EngineConfig())
    harness.engine.start()
    try:
        requests = [
            {"image": picture(n), "mask_image": mask(), "seed": n, "strength": strength}
            for n, strength in enumerate((1.0, 0.6, 1.0))
        ]
        solo = [harness.picture(**request) for request in requests]
        networks.gate.clear()
        futures = [harness.ask(**request) for request in requests]
        networks.gate.set()

        assert [future.result(WAIT_S).pictures[0] for future in futures] == solo
        assert len(set(solo)) == 3
        buffer = BytesIO()
        np.save(buffer, np.zeros((4, 8, 8), np.float32))
        with pytest.raises(InvalidRequest, match=r"^image: latents, but this checkpoint must be"):
            harness.ask(image=buffer.getvalue(), mask_image=mask())
        with pytest.raises(
            InvalidRequest, match=r"^image: missing; this checkpoint is for inpaint"
        ):
            harness.ask()
    finally:
        harness.engine.close()


def test_a_safety_checker_that_is_off_says_nothing(harness: Harness) -> None:
    harness.networks.nsfw_above = -100.0

    assert "nsfw_content_detected" not in harness.ask().result(WAIT_S).info


def test_a_safety_checker_flags_pictures(make_rich: Callable[..., Harness]) -> None:
    harness = make_rich(safety_checker="flag")
    plain = harness.ask(seed=1).result(WAIT_S)
    assert plain.info["nsfw_content_detected"] == [False]
    harness.networks.nsfw_above = -100.0
    flagged = harness.ask(seed=1, num_images_per_prompt=2).result(WAIT_S)

    assert flagged.info["nsfw_content_detected"] == [True, True]
    assert flagged.pictures[0] == plain.pictures[0]


def test_a_safety_checker_blanks_pictures(make_rich: Callable[..., Harness]) -> None:
    harness = make_rich(safety_checker="blank")
    assert np.asarray(Image.open(BytesIO(harness.picture(seed=1)))).any()
    harness.networks.nsfw_above = -100.0
    blanked = harness.ask(seed=1).result(WAIT_S)

    assert blanked.info["nsfw_content_detected"] == [True]
    assert not np.asarray(Image.open(BytesIO(blanked.pictures[0]))).any()


def test_a_picture_that_cannot_be_checked_is_not_given_out(
    make_rich: Callable[..., Harness],
) -> None:
    harness = make_rich(safety_checker="blank")
    error = NetworkFailed("safety_checker", "gone")
    harness.networks.fail_always["safety_checker"] = error

    with pytest.raises(NetworkFailed, match="safety_checker failed: gone"):
        harness.ask().result(WAIT_S)


def test_a_safety_checker_that_is_not_there_stops_the_start(
    manifest: Manifest, networks: FakeNetworks
) -> None:
    with pytest.raises(ValueError, match=r"safety_checker: blank needs one, .*; allowed is off"):
        Harness(manifest, networks, EngineConfig(safety_checker="blank"))
    with pytest.raises(ValueError, match="safety_checker: 'on' does not exist, there are off, fl"):
        EngineConfig(safety_checker="on")


def test_the_description_says_what_requests_may_name(harness: Harness) -> None:
    description = harness.engine.describe()

    assert description["modes"] == ["text2img", "img2img", "inpaint"]
    assert description["controlnets"] == ["canny", "depth"]
    assert description["loras"] == ["ink", "pixelart"]
    assert description["variants"] == ["watercolor"]
    assert description["safety_checker"] == "off"
    assert "unipc" in description["samplers"]
    assert description["limits"]["max_size"] == 128
    json.dumps(description)


def test_what_a_picture_was_made_with_stands_in_it(harness: Harness) -> None:
    request = {"image": picture(), "mask_image": mask(), "lora": ("ink",), "lora_scale": (0.5,)}
    encoded = harness.picture(**request, **CANNY, strength=0.5, variant="watercolor")
    facts = json.loads(Image.open(BytesIO(encoded)).text["darkroom"])

    assert (facts["mode"], facts["strength"], facts["variant"]) == ("inpaint", 0.5, "watercolor")
    assert facts["controlnets"] == {"canny": 1.0}
    assert facts["loras"] == {"ink": 0.5}


def test_large_pictures_are_decoded_and_encoded_in_tiles(
    make_rich: Callable[..., Harness],
) -> None:
    """The fake decoder is local, so that its tiles are the picture."""
    request = {"width": 128, "height": 96, "image": picture(1, (128, 96)), "strength": 0.5}
    whole, *tiled = (
        make_rich(vae_tile_size=size, vae_tile_overlap=16).picture(**request)
        for size in (0, 128, 64, 48)
    )

    for picture_in_tiles in tiled:
        first, other = (
            np.asarray(Image.open(BytesIO(it))).astype(int) for it in (whole, picture_in_tiles)
        )
        assert np.abs(first - other).max() <= 1
