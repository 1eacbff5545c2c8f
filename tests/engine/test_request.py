"""Bad input is refused with the field, the value and the allowed range."""

import base64
import math
from dataclasses import replace
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
    assert (request.negative_prompt, request.num_images_per_prompt) == (None, 1)
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
    steps = [len(parse(guidance_scale=scale).guided_steps(25)) for scale in (0.0, 1.0, 1.01, 7.5)]

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

    assert request.guided_steps(10) == expected


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


def npy(array: np.ndarray) -> bytes:
    buffer = BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def zeros(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


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
        ({"strength": 0.5}, "strength: needs a starting picture, image"),
        (
            {"strength": 1.5, "image": picture((512, 512))},
            "strength: 1.5 is out of range, allowed are 0 to 1",
        ),
        ({"prompt": b"caf\xe9"}, "prompt: not UTF-8 text: byte 0xe9 at position 3"),
        ({"negative_prompt": b"\xff"}, "negative_prompt: not UTF-8 text: byte 0xff at position 0"),
        ({"prompt": b"x" * 16_385}, "prompt: 16385 bytes is too long, allowed are 0 to 16384"),
        ({"prompt": 7}, "prompt: 7 is not text"),
        ({"image": b"no picture"}, "image: 10 bytes that are no readable picture, allowed are PNG"),
        ({"image": picture()[:40]}, "image: 40 bytes that are no readable picture"),
        ({"image": 3}, "image: not the bytes of a picture"),
        ({"mask_image": picture()}, "mask_image: needs a starting picture, image"),
        (
            {"mask_image": b"", "image": picture((512, 512))},
            "mask_image: 0 bytes that are no readable picture",
        ),
        (
            {"image": picture()},
            "image: its width is 8, allowed are 128 to 1024; width says to what",
        ),
        (
            {"image": picture((512, 4096))},
            "image: its height is 4096, allowed are 128 to 1024; height says to what size",
        ),
        ({"image": picture(), "width": 100, "height": 128}, "width: 100 is out of range"),
        ({"image": b"\x93NUMPY\x01\x00"}, "image: latents that cannot be read, allowed is a .npy"),
        ({"image": npy(np.zeros((4, 8, 8)))}, "image: latents of float64 and shape .4, 8, 8., all"),
        (
            {"image": npy(zeros(3, 8, 8))},
            r"image: latents of float32 and shape .3, 8, 8., .*\[4, h",
        ),
        ({"image": npy(zeros(4, 8))}, r"image: latents of float32 and shape .4, 8., allowed are"),
        ({"image": npy(zeros(4, 0, 8))}, "image: latents of shape .4, 0, 8., allowed are 1 to"),
        ({"image": npy(zeros(4, 8, 8) * np.nan)}, "image: latents of .* finite numbers"),
        ({"image": npy(zeros(4, 64, 64)), "width": 256}, "width: the latents of image are for 512"),
        ({"image": npy(zeros(4, 63, 64))}, "height: 504 is not a multiple of 64"),
        ({"denoising_start": 0.5}, "denoising_start: needs what was made before, image"),
        ({"denoising_end": 1.5}, "denoising_end: 1.5 is out of range, allowed are 0 to 1"),
        ({"original_size": (512, 512)}, "original_size: this checkpoint is not told of it"),
        ({"negative_aesthetic_score": 2.0}, "negative_aesthetic_score: this checkpoint is not"),
        ({"controlnet": (b"canny",)}, "controlnet: 'canny' does not exist, there are none"),
        ({"control_image": (picture(),)}, "control_image: needs the names of ControlNets, contr"),
        ({"lora": (b"pixelart",)}, "lora: 'pixelart' does not exist, there are none"),
        ({"lora_scale": (1.0,)}, "lora_scale: needs the names of adapters, lora"),
        ({"variant": b"watercolor"}, "variant: 'watercolor' does not exist, there are none"),
        (
            {"cfg": 7.0},
            "cfg: no such field; there are aesthetic_score, clip_skip, control_guidance",
        ),
    ],
)
def test_bad_fields_are_named_with_value_and_range(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=f"^{message}") as caught:
        parse(**fields)

    assert caught.value.field == message.partition(":")[0]


def test_a_missing_prompt_is_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"^prompt: missing; an empty text is allowed"):
        ImageRequest.parse({"seed": 1}, LIMITS)


RICH = replace(
    LIMITS,
    size_fields=("original_size", "crops_coords_top_left", "target_size"),
    controlnets=("canny", "depth"),
    loras=("ink", "pixelart"),
    variants=("watercolor",),
)


def parse_rich(**fields: Any) -> ImageRequest:
    return ImageRequest.parse({"prompt": b"a cat", **fields}, RICH)


def test_a_starting_picture_gives_the_size_that_is_not_given() -> None:
    assert parse(image=picture((520, 700))).width == 512
    assert parse(image=picture((520, 700))).height == 640
    request = parse(image=picture((520, 8)), height=256)
    assert (request.width, request.height) == (512, 256)


@pytest.mark.parametrize("prefix", [b"", b"data:image/png;base64,"])
def test_a_starting_picture_may_be_base64(prefix: bytes) -> None:
    request = parse(image=prefix + base64.b64encode(picture((512, 256))))

    assert request.start is not None
    assert request.start.picture is not None
    assert request.start.picture.size == (512, 256)


def test_a_starting_picture_is_turned_as_its_camera_was_held() -> None:
    buffer = BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (512, 256)).save(buffer, "JPEG", exif=exif)
    request = parse(image=buffer.getvalue())

    assert (request.width, request.height) == (256, 512)


def test_strength_is_by_default_that_of_diffusers() -> None:
    image = picture((512, 512))

    assert parse(image=image).start.strength == 0.8
    assert parse(image=image, mask_image=picture()).start.strength == 1.0
    assert parse(image=image, strength=float(np.float32(0.7))).start.strength == 0.7


def test_latents_start_a_picture_of_their_size() -> None:
    latents = np.random.default_rng(0).normal(size=(4, 64, 32)).astype(np.float32)
    request = parse(image=npy(latents), denoising_start=0.8)

    assert (request.width, request.height) == (256, 512)
    np.testing.assert_array_equal(request.start.latents, latents)


def test_latents_that_are_a_pickle_are_not_read() -> None:
    pickled = npy(np.array([object()], object))

    with pytest.raises(InvalidRequest, match=r"^image: latents that cannot be read"):
        parse(image=pickled)


def test_sizes_are_by_default_the_pictures_own() -> None:
    request = parse_rich(width=512, height=256)
    assert request.original_size == request.target_size == (256, 512)
    assert request.crops_coords_top_left == (0, 0)

    given = parse_rich(original_size=(100, 200), crops_coords_top_left=(3, 4))
    assert (given.original_size, given.crops_coords_top_left) == ((100, 200), (3, 4))


def test_controls_and_adapters_are_read_in_their_order() -> None:
    request = parse_rich(
        controlnet=(b"depth", b"canny"),
        control_image=(picture((8, 8)), picture((9, 9))),
        controlnet_conditioning_scale=(0.5, 1.5),
        control_guidance_end=(0.6, 1.0),
        lora=(b"pixelart", b"ink"),
        lora_scale=(0.7, -0.5),
        variant=b"watercolor",
    )

    depth, canny = request.controls
    assert (depth.name, depth.scale, depth.start, depth.end) == ("depth", 0.5, 0, 0.6)
    assert (canny.name, canny.image.size, canny.scale) == ("canny", (9, 9), 1.5)
    assert request.loras == (("pixelart", 0.7), ("ink", -0.5))
    assert request.variant == "watercolor"
    # One alone needs no tuple, and scales are 1 if left out.
    assert parse_rich(controlnet=b"canny", control_image=picture()).controls[0].scale == 1
    assert parse_rich(lora=b"ink").loras == (("ink", 1.0),)


CANNY = {"controlnet": (b"canny",), "control_image": (picture(),)}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"original_size": (512,)}, "original_size: 1 numbers, allowed are 2"),
        ({"original_size": (0, 512)}, "original_size: 0 is out of range, allowed are 1 to 16384"),
        ({"crops_coords_top_left": (-1, 0)}, "crops_coords_top_left: -1 is out of range.* 0 to"),
        ({"aesthetic_score": 6.0}, "aesthetic_score: this checkpoint is not told of it"),
        ({"controlnet": (b"pose",)}, "controlnet: 'pose' does not exist, there are canny, depth"),
        ({"controlnet": (b"canny",) * 9}, "controlnet: 9 names, allowed are 1 to 8"),
        ({"controlnet": (b"canny",)}, "control_image: 0 given, allowed are 1, one for a name"),
        (
            CANNY | {"control_image": (b"no",)},
            "control_image: 2 bytes that are no readable picture",
        ),
        (
            CANNY | {"controlnet_conditioning_scale": (1.0, 2.0)},
            "controlnet_conditioning_scale: 2 given, allowed are 1, one for a name",
        ),
        (
            CANNY | {"controlnet_conditioning_scale": (11.0,)},
            "controlnet_conditioning_scale: 11 is out of range, allowed are 0 to 10",
        ),
        (
            CANNY | {"control_guidance_start": (0.5,), "control_guidance_end": (0.5,)},
            "control_guidance_start: 0.5 is not before control_guidance_end, which is 0.5",
        ),
        ({"lora": (b"ink", b"ink")}, "lora: ink, ink names one twice, allowed is once"),
        ({"lora": (b"ink",), "lora_scale": (99.0,)}, "lora_scale: 99 is out of range.* -10 to 10"),
        ({"lora": (b"ink",), "lora_scale": (1.0, 1.0)}, "lora_scale: 2 given, allowed are 1"),
        ({"variant": b"oil"}, "variant: 'oil' does not exist, there are watercolor"),
    ],
)
def test_bad_controls_adapters_and_sizes_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=f"^{message}"):
        parse_rich(**fields)


@pytest.mark.parametrize(
    ("modes", "fields", "message"),
    [
        (("inpaint",), {}, "image: missing; this checkpoint is for inpaint"),
        (("inpaint",), {"image": picture((512, 512))}, "mask_image: missing; .* for inpaint"),
        (("img2img", "inpaint"), {}, "image: missing; .* is for img2img and inpaint"),
        (("text2img",), {"image": picture((512, 512))}, "image: not possible; .* for text2img"),
    ],
)
def test_a_mode_that_the_checkpoint_has_not_is_refused(
    modes: tuple[str, ...], fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidRequest, match=f"^{message}"):
        ImageRequest.parse({"prompt": b"", **fields}, replace(LIMITS, modes=modes))


def test_sides_have_to_go_together_where_engines_were_built_for_them() -> None:
    limits = replace(LIMITS, sizes=[[[512, 768], [512, 512]], [[512, 512], [512, 768]]])

    tall = ImageRequest.parse({"prompt": b"a cat", "height": 768, "width": 512}, limits)
    with pytest.raises(InvalidRequest) as refusal:
        ImageRequest.parse({"prompt": b"a cat", "height": 768, "width": 768}, limits)

    assert (tall.height, tall.width) == (768, 512)
    assert str(refusal.value) == (
        "width: 768 with a height of 768, allowed are 512 to 512 with a height of 512 to 768 or "
        "512 to 768 with a height of 512 to 512"
    )
