"""Every mode through a real server: alone as diffusers has it, and mixed in one batch."""

import base64
import json
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pixels import levels

from darkroom import Client, Done, InvalidRequest
from darkroom.server import Server, free_ports

pytest.importorskip("torch")

from equivalence.cases import CASES, PROMPT
from equivalence.compare import compare, options_of
from equivalence.reference import Reference, mask, picture
from equivalence.workshop import WITH_LORAS, WITH_SAFETY_CHECKER, Workshop

FOLDER = Path(__file__).parents[2] / "build" / "equivalence"
MODEL = "tiny"
OURS = [case for case in CASES if case.architecture == WITH_LORAS]
SHOWN = (
    *("image to image", "inpainting in part", "two ControlNets"),
    *("two LoRAs of the request", "LoRA fused at export"),
)


@pytest.fixture(scope="module")
def workshop() -> Workshop:
    return Workshop(FOLDER)


@pytest.fixture(scope="module")
def tiny(workshop: Workshop) -> Iterator[Server]:
    """A checkpoint with ControlNets, adapters and a variant."""
    with Server(workshop.repository(WITH_LORAS), free_ports()) as server:
        yield server


@pytest.fixture(scope="module")
def asking(tiny: Server) -> Iterator[Client]:
    with Client(tiny.grpc_url, timeout=120) as client:
        yield client


@pytest.mark.parametrize("name", SHOWN)
def test_the_served_picture_is_that_of_diffusers(
    workshop: Workshop, asking: Client, name: str
) -> None:
    (case,) = (case for case in OURS if case.name == name)

    def generate(_: str, prompt: str, **options: Any) -> Sequence[Image.Image]:
        return [asking.generate(prompt, **options)]

    comparison = compare(case, Reference(*workshop.reference_folders()), generate)

    assert comparison.is_equal, comparison


def test_mixed_modes_at_once_make_their_solo_pictures(asking: Client) -> None:
    requests = [
        options_of(case) | {"seed": seed, "num_images_per_prompt": 1}
        for seed, case in enumerate(OURS)
    ]
    solo = [asking.generate(PROMPT, **request)[0] for request in requests]

    with ThreadPoolExecutor(len(requests)) as pool:
        together = list(pool.map(lambda it: asking.generate(PROMPT, **it)[0], requests))

    for request, alone, crowded in zip(requests, solo, together, strict=True):
        assert np.abs(levels(alone) - levels(crowded)).max() <= 1, request


def test_a_starting_picture_comes_in_by_every_door(tiny: Server, asking: Client) -> None:
    options = {"image": picture(1), "mask_image": mask(), "strength": 0.6, "seed": 3}
    expected = asking.generate("a red circle", **options)
    with Client(tiny.http_url, timeout=120) as http:
        by_http = http.generate("a red circle", **options)
        *_, done = http.stream("a red circle", **options)
    assert isinstance(done, Done)
    body = {name: as_base64(options[name]) for name in ("image", "mask_image")}
    body |= {"prompt": "a red circle", "strength": 0.6, "seed": 3, "output_format": "b64_png"}
    answer = urllib.request.urlopen(
        f"{tiny.http_url}/v2/models/stable_diffusion/generate", json.dumps(body).encode()
    )
    by_json = Image.open(BytesIO(base64.b64decode(json.loads(answer.read())["image"])))

    for image in (by_http, done.pictures[0], by_json):
        np.testing.assert_array_equal(levels(image), levels(expected))


def as_base64(image: Image.Image) -> str:
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def test_latents_go_out_and_come_in_again(asking: Client) -> None:
    request = {"seed": 2, "num_inference_steps": 6, "sampler": "ddim"}
    whole = asking.generate(PROMPT, **request)
    half = asking.generate_latents(PROMPT, **request, denoising_end=0.5)
    rest = asking.generate(PROMPT, **request, image=half, denoising_start=0.5)

    assert np.abs(levels(whole) - levels(rest)).max() <= 1


def test_the_server_tells_what_requests_may_name(asking: Client) -> None:
    (told,) = asking.info()

    assert told.controlnets == ("canny", "depth")
    assert told.loras == ("ink", "pixelart")
    assert told.variants == ("watercolor",)
    with pytest.raises(InvalidRequest, match="lora: 'oil' does not exist, there are ink, pixelart"):
        asking.generate(PROMPT, lora="oil")


def test_pictures_are_flagged_and_blanked_as_diffusers_does(workshop: Workshop) -> None:
    import torch
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
    from transformers import CLIPImageProcessor

    folder = workshop.checkpoint(WITH_SAFETY_CHECKER)
    checker = StableDiffusionSafetyChecker.from_pretrained(folder, subfolder="safety_checker")
    processor = CLIPImageProcessor.from_pretrained(folder, subfolder="feature_extractor")
    parameters = {"safety_checker": "blank"}
    plain_server = Server(workshop.repository(WITH_SAFETY_CHECKER), free_ports())
    with plain_server, Client(plain_server.grpc_url, timeout=120) as client:
        plain = [client.generate(PROMPT, seed=seed, num_inference_steps=2) for seed in range(6)]
    server = Server(plain_server.repository, free_ports(), engine_parameters=parameters)
    with server, Client(server.grpc_url, timeout=120) as client:
        checked = [client.generate(PROMPT, seed=seed, num_inference_steps=2) for seed in range(6)]

    for before, after in zip(plain, checked, strict=True):
        inputs = processor([before], return_tensors="pt").pixel_values
        images = np.asarray(before, np.float32)[None] / 255
        with torch.no_grad():
            _, (expected,) = checker.float()(clip_input=inputs, images=images)
        assert before.nsfw_content_detected is None
        assert after.nsfw_content_detected == expected
        np.testing.assert_array_equal(levels(after), 0 if expected else levels(before))
