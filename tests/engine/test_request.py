"""Bad input is refused with the field, the value and the allowed range."""

import math
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from engine_harness import LIMITS
from PIL import Image

from darkroom_engine import ImageRequest, InvalidRequest
from darkroom_engine.request import MAX_SEED


def parse(**fields: Any) -> ImageRequest:
    return ImageRequest.parse({"prompt": b"a cat", **fields}, LIMITS)


def test_what_is_left_out_takes_the_checkpoints_defaults() -> None:
    request = parse()

    assert (request.width, request.height, request.num_inference_steps) == (512, 512, 25)
    assert (request.guidance_scale, request.sampler) == (7.5, "unipc")
    assert (request.negative_prompt, request.num_images_per_prompt) == ("", 1)
    assert (request.output_format, request.priority, request.timeout_ms) == ("png", 0, None)


def test_a_seed_is_drawn_if_none_is_given() -> None:
    assert len({parse().seed for _ in range(8)}) > 1


def test_seed_zero_is_a_seed() -> None:
    assert parse(seed=0).seed == 0


def test_an_empty_prompt_is_allowed() -> None:
    assert parse(prompt=b"").prompt == ""


def test_text_is_utf8() -> None:
    assert parse(prompt="ein Bär ☃".encode()).prompt == "ein Bär ☃"


def test_guidance_above_one_is_on_at_every_step() -> None:
    steps = [len(parse(guidance_scale=scale).guided_steps) for scale in (0.0, 1.0, 1.01, 7.5)]

    assert steps == [0, 0, 25, 25]


@pytest.mark.parametrize(
    ("start", "stop", "expected"),
    [
        (0.0, 1.0, range(10)),
        (0.2, 0.7, range(2, 7)),
        # As they arrive: the nearest float32 lies below.
        (float(np.float32(0.3)), float(np.float32(0.7)), range(3, 7)),
        (0.25, 0.99, range(2, 9)),
        (0.5, 0.5, range(5, 5)),
        (1.0, 1.0, range(10, 10)),
    ],
)
def test_guidance_is_on_from_start_to_stop(start: float, stop: float, expected: range) -> None:
    request = parse(num_inference_steps=10, guidance_start=start, guidance_stop=stop)

    assert request.guided_steps == expected


def test_rare_fields_are_the_checkpoints_business_unless_given() -> None:
    request = parse()

    assert (request.eta, request.timestep_spacing) == (None, None)
    assert (request.guidance_rescale, request.guidance_start, request.guidance_stop) == (0, 0, 1)
    assert (request.clip_skip, request.max_embeddings_multiples) == (0, 1)
    given = parse(eta=0.0, timestep_spacing=b"trailing", clip_skip=2, max_embeddings_multiples=4)
    assert (given.eta, given.timestep_spacing) == (0.0, "trailing")
    assert (given.clip_skip, given.max_embeddings_multiples) == (2, 4)


def picture(size: tuple[int, int] = (8, 8)) -> bytes:
    buffer = BytesIO()
    Image.new("RGB", size).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps: 0 is out of range, allowed are 1 to"),
        ({"num_inference_steps": 151}, "num_inference_steps: 151 is out of range.* 1 to 150"),
        ({"num_inference_steps": 2.5}, "num_inference_steps: 2.5 is not a whole number"),
        ({"guidance_scale": math.nan}, "guidance_scale: nan is out of range, allowed are 0 to 50"),
        ({"guidance_scale": math.inf}, "guidance_scale: inf is out of range"),
        ({"guidance_scale": -1.0}, "guidance_scale: -1 is out of range"),
        ({"guidance_scale": b"7"}, "guidance_scale: b'7' is not a number"),
        ({"guidance_rescale": 1.1}, "guidance_rescale: 1.1 is out of range, allowed are 0 to 1"),
        ({"guidance_start": -0.1}, "guidance_start: -0.1 is out of range, allowed are 0 to 1"),
        ({"guidance_stop": 1.1}, "guidance_stop: 1.1 is out of range, allowed are 0 to 1"),
        ({"guidance_stop": 0.2, "guidance_start": 0.5}, "guidance_stop: 0.2 is out .* 0.5 to 1"),
        ({"eta": math.nan}, "eta: nan is out of range, allowed are 0 to 1"),
        (
            {"timestep_spacing": b"karras"},
            "timestep_spacing: 'karras' does not exist, there are lin",
        ),
        ({"clip_skip": 12}, "clip_skip: 12 is out of range, allowed are 0 to 11"),
        ({"max_embeddings_multiples": 5}, "max_embeddings_multiples: 5 is out of range.* 1 to 4"),
        ({"seed": -1}, "seed: -1 is out of range, allowed are 0 to 9223372036854775807"),
        ({"seed": MAX_SEED + 1}, "seed: 9223372036854775808 is out of range"),
        ({"seed": MAX_SEED, "num_images_per_prompt": 2}, "seed: .* out of range.*775806"),
        ({"width": 500}, "width: 500 is not a multiple of 64.* from 128 to 1024"),
        ({"height": 64}, "height: 64 is out of range, allowed are 128 to 1024"),
        ({"width": 2048}, "width: 2048 is out of range, allowed are 128 to 1024"),
        ({"sampler": b"magic"}, "sampler: 'magic' does not exist, there are unipc, unipc_karras"),
        ({"output_format": b"gif"}, "output_format: 'gif' does not exist, there are png, jpeg"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt: 0 is out of range.* 1 to 8"),
        ({"num_images_per_prompt": 9}, "num_images_per_prompt: 9 is out of range.* 1 to 8"),
        ({"priority": 11}, "priority: 11 is out of range, allowed are -10 to 10"),
        ({"timeout_ms": 0}, "timeout_ms: 0 is out of range, allowed are 1 to"),
        ({"strength": 1.5}, "strength: 1.5 is out of range, allowed are 0 to 1"),
        ({"prompt": b"caf\xe9"}, "prompt: not UTF-8 text: byte 0xe9 at position 3"),
        ({"negative_prompt": b"\xff"}, "negative_prompt: not UTF-8 text: byte 0xff at position 0"),
        ({"prompt": b"x" * 16_385}, "prompt: 16385 bytes is too long, allowed are 0 to 16384"),
        ({"prompt": 7}, "prompt: 7 is not text"),
        ({"image": b"no picture"}, "image: 10 bytes that are no readable picture, allowed are PNG"),
        ({"image": picture()[:40]}, "image: 40 bytes that are no readable picture"),
        ({"image": 3}, "image: not the bytes of a picture"),
        ({"mask_image": b""}, "mask_image: 0 bytes that are no readable picture"),
        ({"image": picture()}, r"image: a starting picture .* needs a vae_encoder network"),
        ({"cfg": 7.0}, "cfg: no such field; there are clip_skip, eta, guidance_rescale,"),
    ],
)
def test_bad_fields_are_named_with_value_and_range(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=f"^{message}") as caught:
        parse(**fields)

    assert caught.value.field == next(iter(fields))


def test_a_missing_prompt_is_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"^prompt: missing; an empty text is allowed"):
        ImageRequest.parse({"seed": 1}, LIMITS)
