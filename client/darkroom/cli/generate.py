"""`darkroom generate`: ask a server for pictures and save them."""

import argparse
import sys
from pathlib import Path
from typing import Any

from PIL import Image

from darkroom.cli import scaled
from darkroom.cli.arguments import add_model, add_repeatable, add_url, count
from darkroom.client import Client
from darkroom.events import Done, Preview
from darkroom.exceptions import DarkroomError
from darkroom.options import Options
from darkroom.picture import Picture
from darkroom.progress import terminal_progress
from darkroom.step_line import StepLine

DENOISING_END = 0.8
"""Where a base model leaves off for its refiner, as in diffusers' examples of SDXL."""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("generate", help="ask a server for a picture and save it")
    parser.add_argument("prompt")
    parser.add_argument("-o", "--output", type=Path, default=Path("picture.png"), metavar="FILE")
    add_url(parser)
    add_model(parser)
    parser.add_argument("--negative-prompt")
    parser.add_argument("--num-inference-steps", type=int, metavar="N")
    parser.add_argument("--guidance-scale", type=float, metavar="X")
    parser.add_argument("--guidance-rescale", type=float, metavar="X", help="0 to 1")
    parser.add_argument("--guidance-start", type=float, metavar="X", help="share of the steps")
    parser.add_argument("--guidance-stop", type=float, metavar="X", help="share of the steps")
    parser.add_argument("--seed", type=int, metavar="N")
    parser.add_argument("--width", type=int, metavar="PIXELS")
    parser.add_argument("--height", type=int, metavar="PIXELS")
    parser.add_argument("--sampler")
    parser.add_argument(
        "--eta", type=float, metavar="X", help="0 to 1, for the ddim and tcd samplers"
    )
    parser.add_argument("--timestep-spacing", help="linspace, leading or trailing")
    parser.add_argument("--clip-skip", type=int, metavar="N")
    parser.add_argument(
        "--max-embeddings-multiples",
        type=int,
        metavar="N",
        help="read prompts of up to N times 77 tokens",
    )
    parser.add_argument(
        "--num-images", type=count, metavar="N", help="save N pictures, FILE-0, FILE-1 and so on"
    )
    parser.add_argument("--image", metavar="FILE", help="a picture to start from")
    parser.add_argument(
        "--mask-image", metavar="FILE", help="white where --image is painted anew, else black"
    )
    parser.add_argument(
        "--strength", type=float, metavar="X", help="0 to 1, how much --image may change"
    )
    add_repeatable(
        parser,
        "--control",
        scaled.control,
        "NAME=FILE[:SCALE]",
        "a ControlNet and the picture it follows",
    )
    add_repeatable(parser, "--lora", scaled.adapter, "NAME[:SCALE]", "an adapter to mix in")
    parser.add_argument("--variant", metavar="NAME", help="a variant of the checkpoint")
    parser.add_argument(
        "--refiner", metavar="MODEL", help="a model of the same server that makes the last steps"
    )
    parser.add_argument(
        "--denoising-end",
        type=float,
        metavar="X",
        help=f"0 to 1, where the refiner takes over; default: {DENOISING_END}",
    )
    parser.add_argument(
        "--preview",
        type=Path,
        metavar="FILE",
        help="keep the latest preview in this file while the picture is made",
    )
    parser.add_argument("--request-id", metavar="ID", help="what `darkroom cancel` takes")
    parser.add_argument("--timeout", type=float, default=600.0, metavar="SECONDS")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    if options.denoising_end is not None and options.refiner is None:
        raise DarkroomError("--denoising-end: needs --refiner, to go on from there")
    # Refused before the work, not after it.
    outputs = _outputs(options.output, options.num_images)
    for file in filter(None, (*outputs, options.preview)):
        _check_picture_file(file)
    with Client(options.url, model=options.model) as client:
        if options.refiner is None:
            pictures = _ask(client, options, _fields(options), options.num_images)
        else:
            pictures = _ask_both(client, options, _fields(options))
    for note in dict.fromkeys(note for picture in pictures for note in picture.notes):
        print(f"note: {note}", file=sys.stderr)
    for output, picture in zip(outputs, pictures, strict=True):
        _save(picture, output)
        print(f"{output}: {picture.width}x{picture.height}, seed {picture.seed}")
    return 0


def _outputs(output: Path, num_images: int | None) -> list[Path]:
    if num_images is None or num_images == 1:
        return [output]
    return [output.with_stem(f"{output.stem}-{index}") for index in range(num_images)]


def _save(picture: Picture, output: Path) -> None:
    try:
        if output.suffix.lower() == ".png":
            # As it came, with the provenance that the server wrote into it.
            output.write_bytes(picture.encoded)
        else:
            picture.save(output)
    except (OSError, ValueError) as error:
        raise DarkroomError(f"{output}: {error}") from None


def _check_picture_file(path: Path) -> None:
    if not path.parent.is_dir():
        raise DarkroomError(f"{path.parent}: no such folder to save the picture in")
    if path.is_dir():
        raise DarkroomError(f"{path}: is a folder, not a file to save the picture in")
    if path.suffix.lower() not in Image.registered_extensions():
        raise DarkroomError(f"{path}: no picture format has the suffix {path.suffix!r}")


def _fields(options: argparse.Namespace) -> Options:
    fields: Options = {
        "negative_prompt": options.negative_prompt,
        "num_inference_steps": options.num_inference_steps,
        "guidance_scale": options.guidance_scale,
        "guidance_rescale": options.guidance_rescale,
        "guidance_start": options.guidance_start,
        "guidance_stop": options.guidance_stop,
        "seed": options.seed,
        "width": options.width,
        "height": options.height,
        "sampler": options.sampler,
        "eta": options.eta,
        "timestep_spacing": options.timestep_spacing,
        "clip_skip": options.clip_skip,
        "max_embeddings_multiples": options.max_embeddings_multiples,
        "image": options.image,
        "mask_image": options.mask_image,
        "strength": options.strength,
        "variant": options.variant,
    }
    if options.control:
        fields["controlnet"] = [control.name for control in options.control]
        fields["control_image"] = [control.file for control in options.control]
        fields["controlnet_conditioning_scale"] = scaled.scales(options.control)
    if options.lora:
        fields["lora"] = [adapter.name for adapter in options.lora]
        fields["lora_scale"] = scaled.scales(options.lora)
    return fields


def _ask_both(base: Client, options: argparse.Namespace, fields: Options) -> list[Picture]:
    """What the refiner makes of what the base model begins."""
    denoising_end = DENOISING_END if options.denoising_end is None else options.denoising_end
    fields["denoising_end"] = denoising_end
    with terminal_progress("generating"):
        begun = base.generate_latents(
            options.prompt,
            num_images_per_prompt=options.num_images or 1,
            request_id=options.request_id,
            timeout=options.timeout,
            **fields,
        )
    pictures = []
    with Client(options.url, model=options.refiner) as refiner:
        for latents in begun:
            refined: Options = {
                **fields,
                **_OF_THE_BASE_ALONE,
                "image": latents,
                "denoising_start": denoising_end,
                "seed": latents.seed,
            }
            pictures += _ask(refiner, options, refined, None, "refining")
    return pictures


_OF_THE_BASE_ALONE: Options = {
    # The latents have the size.
    "width": None,
    "height": None,
    "mask_image": None,
    "strength": None,
    "controlnet": None,
    "control_image": None,
    "controlnet_conditioning_scale": None,
    "lora": None,
    "lora_scale": None,
    "variant": None,
    "denoising_end": None,
}


def _ask(
    client: Client,
    options: argparse.Namespace,
    fields: Options,
    num_images: int | None,
    task: str = "generating",
) -> list[Picture]:
    if options.preview is None and not sys.stderr.isatty():
        # Nobody watches, and what is not streamed may come out of the server's response cache.
        with terminal_progress(task):
            if num_images is None:
                return [
                    client.generate(
                        options.prompt,
                        request_id=options.request_id,
                        timeout=options.timeout,
                        **fields,
                    )
                ]
            return client.generate(
                options.prompt,
                num_images_per_prompt=num_images,
                request_id=options.request_id,
                timeout=options.timeout,
                **fields,
            )
    with (
        StepLine(task) as line,
        client.stream(
            options.prompt,
            num_images_per_prompt=num_images,
            preview_interval=None if options.preview is None else 1,
            request_id=options.request_id,
            timeout=options.timeout,
            **fields,
        ) as events,
    ):
        for event in events:
            line.tell(event)
            # One file can show one of several pictures.
            if isinstance(event, Preview) and event.index == 0:
                _replace_picture(options.preview, event.image)
            if isinstance(event, Done):
                return event.pictures
    raise AssertionError("this is a bug: a stream ends with Done or an error")


def _replace_picture(path: Path, image: Image.Image) -> None:
    """Write the file so that whoever looks at it meanwhile sees the old picture or the new one."""
    part = path.with_name(f".{path.stem}.part{path.suffix}")
    try:
        image.save(part)
        part.replace(path)
    except (OSError, ValueError) as error:
        part.unlink(missing_ok=True)
        raise DarkroomError(f"{path}: {error}") from None
