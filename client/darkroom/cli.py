"""The `darkroom` command."""

import argparse
import json
import math
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from darkroom import __version__, protocol, scaled
from darkroom.client import Client
from darkroom.events import Done, Preview
from darkroom.exceptions import DarkroomError, QueueFull, RequestTimeout
from darkroom.model_text import model_text
from darkroom.options import Options
from darkroom.picture import Picture
from darkroom.probe import probe
from darkroom.progress import terminal_progress
from darkroom.served_models import Source
from darkroom.step_line import StepLine

EXIT_FAILED = 1
EXIT_INTERRUPTED = 130
LOW_PROBE_INTERVAL_S = 120.0
LOW_PROBE_TIMEOUT_S = 600.0
DENOISING_END = 0.8
"""Where a base model leaves off for its refiner, as in diffusers' examples of SDXL."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    options = _parser().parse_args(arguments)
    run: Callable[[argparse.Namespace], int] = options.run
    try:
        return run(options)
    except DarkroomError as error:
        print(f"darkroom: {error}", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="darkroom", description="Stable Diffusion on NVIDIA Triton."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_generate(commands)
    _add_info(commands)
    _add_cancel(commands)
    _add_serve(commands)
    _add_probe(commands)
    _add_export(commands)
    _add_add_lora(commands)
    _add_random_checkpoint(commands)
    return parser


def _add_generate(commands: Any) -> None:
    parser = commands.add_parser("generate", help="ask a server for a picture and save it")
    parser.add_argument("prompt")
    parser.add_argument("-o", "--output", type=Path, default=Path("picture.png"), metavar="FILE")
    parser.add_argument("--url", default="localhost:8001", help="default: %(default)s, gRPC")
    _add_model(parser)
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
        "--num-images", type=_count, metavar="N", help="save N pictures, FILE-0, FILE-1 and so on"
    )
    parser.add_argument("--image", metavar="FILE", help="a picture to start from")
    parser.add_argument(
        "--mask-image", metavar="FILE", help="white where --image is painted anew, else black"
    )
    parser.add_argument(
        "--strength", type=float, metavar="X", help="0 to 1, how much --image may change"
    )
    parser.add_argument(
        "--control",
        type=scaled.control,
        action="append",
        default=[],
        metavar="NAME=FILE[:SCALE]",
        help="a ControlNet and the picture it follows; may be repeated",
    )
    parser.add_argument(
        "--lora",
        type=scaled.adapter,
        action="append",
        default=[],
        metavar="NAME[:SCALE]",
        help="an adapter to mix in; may be repeated",
    )
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
    parser.set_defaults(run=_generate)


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        default=protocol.MODEL,
        help="which of the server's models to ask, see `darkroom info`; default: %(default)s",
    )


def _add_info(commands: Any) -> None:
    parser = commands.add_parser("info", help="tell what a server's models are and can do")
    parser.add_argument("model", nargs="?", metavar="MODEL", help="all of them if left out")
    parser.add_argument("--url", default="localhost:8001", help="default: %(default)s, gRPC")
    parser.add_argument("--json", action="store_true", help="all that the server says, as JSON")
    parser.set_defaults(run=_info)


def _add_cancel(commands: Any) -> None:
    parser = commands.add_parser("cancel", help="cancel a request that waits or runs")
    parser.add_argument("request_id", metavar="REQUEST_ID")
    parser.add_argument("--url", default="localhost:8001", help="default: %(default)s, gRPC")
    _add_model(parser)
    parser.set_defaults(run=_cancel)


def _add_serve(commands: Any) -> None:
    parser = commands.add_parser("serve", help="serve exported repositories on this machine")
    parser.add_argument(
        "repositories",
        nargs="+",
        metavar="[NAME=]REPOSITORY",
        help="NAME is what its model is called; of those without, the first is stable_diffusion, "
        "and the others are called as their folders",
    )
    parser.add_argument("--host", default="127.0.0.1", help="default: %(default)s")
    for name, number in (("http", 8000), ("grpc", 8001), ("metrics", 8002)):
        parser.add_argument(f"--{name}-port", type=int, default=number, metavar="PORT")
    parser.add_argument(
        "--max-rows",
        type=_max_rows,
        metavar="N",
        help="rows of one call of the denoiser, or auto: as many as fit into memory",
    )
    parser.add_argument(
        "--memory-profile",
        choices=["low", "balanced", "full"],
        default="full",
        help="what to save memory for, at the price of time; default: %(default)s, nothing",
    )
    parser.add_argument(
        "--safety-checker",
        choices=["off", "flag", "blank"],
        help="what happens to pictures that the checkpoint's safety checker finds not safe",
    )
    parser.add_argument(
        "--response-cache",
        type=_bytes,
        default=0,
        metavar="SIZE",
        help="keep answers, to give them again to equal requests: 64MB, say; off by default",
    )
    parser.add_argument(
        "--log-file",
        type=Path,
        metavar="FILE",
        help="append tritonserver's log to this file; without it the log goes with the server",
    )
    parser.add_argument(
        "--trace-config",
        action="append",
        default=[],
        metavar="SETTING",
        help="a setting of Triton's tracing, such as mode=opentelemetry; may be repeated",
    )
    parser.add_argument(
        "--probe-timeout",
        type=_seconds,
        default=120.0,
        metavar="SECONDS",
        help="restart a server that makes no probe picture in this time; default: %(default)g",
    )
    parser.set_defaults(run=_serve)


def _add_probe(commands: Any) -> None:
    parser = commands.add_parser(
        "probe", help="ask a server for its smallest picture, to see whether it works"
    )
    parser.add_argument("--url", default="localhost:8001", help="default: %(default)s, gRPC")
    parser.add_argument("--model", default=protocol.MODEL, help="default: %(default)s")
    parser.add_argument("--timeout", type=_seconds, default=60.0, metavar="SECONDS")
    parser.set_defaults(run=_probe)


def _add_export(commands: Any) -> None:
    parser = commands.add_parser("export", help="turn a checkpoint into a verified repository")
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="a diffusers folder, .safetensors file or hub id"
    )
    parser.add_argument("repository", type=Path, metavar="REPOSITORY")
    parser.add_argument("--precision", choices=["fp32", "fp16"], default="fp32")
    parser.add_argument(
        "--config", metavar="FOLDER", help="the architecture of a single .safetensors file"
    )
    parser.add_argument("--force", action="store_true", help="replace another repository")
    parser.add_argument(
        "--controlnet",
        action="append",
        default=[],
        type=_named,
        metavar="NAME=PATH",
        help="export a ControlNet too, as NAME; may be repeated",
    )
    parser.add_argument(
        "--safety-checker", action="store_true", help="export the checkpoint's safety checker too"
    )
    parser.add_argument(
        "--lora",
        action="append",
        default=[],
        type=_named,
        metavar="NAME=PATH",
        help="a LoRA that requests may ask for as NAME, each for its own share; may be repeated",
    )
    parser.add_argument(
        "--variant",
        action="append",
        default=[],
        type=_named,
        metavar="NAME=PATH[:SCALE]",
        help="a LoRA in further networks, that requests may ask for as NAME; may be repeated",
    )
    parser.add_argument(
        "--fuse-lora",
        action="append",
        default=[],
        type=_scaled,
        metavar="PATH[:SCALE]",
        help="a LoRA that becomes part of the weights; may be repeated",
    )
    parser.add_argument("--default-steps", type=int, metavar="N", help="if a request does not say")
    parser.add_argument("--default-guidance-scale", type=float, metavar="X")
    parser.add_argument("--default-sampler", metavar="SAMPLER")
    parser.set_defaults(run=_export)


def _add_add_lora(commands: Any) -> None:
    parser = commands.add_parser(
        "add-lora", help="add LoRAs to a repository that was exported with some, in seconds"
    )
    parser.add_argument("repository", type=Path, metavar="REPOSITORY")
    parser.add_argument("loras", nargs="+", type=_named, metavar="NAME=PATH")
    parser.set_defaults(run=_add_lora)


def _add_random_checkpoint(commands: Any) -> None:
    parser = commands.add_parser(
        "random-checkpoint", help="make a checkpoint with random weights, to test with"
    )
    parser.add_argument(
        "architecture",
        metavar="ARCHITECTURE",
        help="sd15, sd21, sdxl, tiny-sd15, tiny-sdxl, tiny-sd3 ...; an unknown one lists all",
    )
    parser.add_argument("directory", type=Path, metavar="FOLDER")
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(run=_random_checkpoint)


def _generate(options: argparse.Namespace) -> int:
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


def _info(options: argparse.Namespace) -> int:
    with Client(options.url) as client:
        models = client.info() if options.model is None else [client.info(options.model)]
    if options.json:
        said = [dict(model.raw) for model in models]
        print(json.dumps(said if options.model is None else said[0], indent=2))
    elif models:
        print("\n\n".join(model_text(model) for model in models))
    else:
        print(f"{options.url} serves no model")
    return 0


def _cancel(options: argparse.Namespace) -> int:
    with Client(options.url, model=options.model) as client:
        if not client.cancel(options.request_id):
            raise DarkroomError(f"{options.request_id}: no such request is waiting or running")
    print(f"{options.request_id}: cancelled")
    return 0


def _serve(options: argparse.Namespace) -> int:
    # Its needs are an extra.
    from darkroom.server import Ports, ServeInterrupted, Server  # noqa: PLC0415
    from darkroom.supervisor import Patience, Supervisor  # noqa: PLC0415

    server = Server(
        [Source.parse(text) for text in options.repositories],
        Ports(options.host, options.http_port, options.grpc_port, options.metrics_port),
        terminal_progress,
        options.response_cache,
        log_file=options.log_file,
        trace_config=options.trace_config,
        engine_parameters=_engine_parameters(options),
    )

    def interrupt(*_: object) -> None:
        # A flag, since an exception raised inside somebody's __del__ would be lost.
        server.is_stopping = True

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, interrupt)
        server.start()
        models = ", ".join(f"{model.name} ({model.repository})" for model in server.models)
        print(
            f"ready: {models} at gRPC {server.grpc_url}, HTTP {server.http_url}, "
            f"metrics {server.metrics_url}; Ctrl-C stops it",
            flush=True,
        )
        patience = Patience(probe_timeout_s=options.probe_timeout)
        if options.memory_profile == "low":
            # There a picture loads networks, after those that are in use had their turn.
            patience = Patience(
                probe_interval_s=LOW_PROBE_INTERVAL_S,
                probe_timeout_s=max(options.probe_timeout, LOW_PROBE_TIMEOUT_S),
            )
        Supervisor(server, _tell, patience).run()
        _tell("stopping")
    except ServeInterrupted:
        return EXIT_INTERRUPTED
    finally:
        server.stop()
    return 0


def _engine_parameters(options: argparse.Namespace) -> dict[str, str]:
    """The engines' settings that were chosen; what is left out is as the repositories have it."""
    memory_profile = None if options.memory_profile == "full" else options.memory_profile
    chosen = {
        "max_rows": options.max_rows,
        "memory_profile": memory_profile,
        "safety_checker": options.safety_checker,
    }
    return {key: value for key, value in chosen.items() if value is not None}


def _probe(options: argparse.Namespace) -> int:
    start = time.monotonic()
    with Client(options.url, model=options.model) as client:
        try:
            picture = probe(client, options.timeout)
        except QueueFull as error:
            print(f"{options.url} is alive: {error}")
        except RequestTimeout:
            raise DarkroomError(f"{options.url}: no picture within {options.timeout:g} s") from None
        else:
            print(
                f"{options.url} is alive: it made a picture of {picture.width}x{picture.height} "
                f"in {time.monotonic() - start:.2f} s"
            )
    return 0


def _export(options: argparse.Namespace) -> int:
    with _extra("export"):
        from darkroom_export import (  # noqa: PLC0415  its needs are an extra
            ExportError,
            Precision,
            export_checkpoint,
        )
    try:
        is_new = export_checkpoint(
            options.checkpoint,
            options.repository,
            precision=Precision(options.precision),
            config=options.config,
            force=options.force,
            progress=terminal_progress,
            controlnets=_once("--controlnet", options.controlnet),
            safety_checker=options.safety_checker,
            loras=_once("--lora", options.lora),
            variants={
                name: [_scaled(path) for given, path in options.variant if given == name]
                for name, _ in options.variant
            },
            fused_loras=options.fuse_lora,
            num_inference_steps=options.default_steps,
            guidance_scale=options.default_guidance_scale,
            sampler=options.default_sampler,
        )
    except ExportError as error:
        raise DarkroomError(str(error)) from error
    state = "exported and verified" if is_new else "up to date"
    print(f"{options.repository}: {state}; next: darkroom serve {options.repository}")
    return 0


def _add_lora(options: argparse.Namespace) -> int:
    with _extra("export"):
        from darkroom_export import ExportError, add_adapters  # noqa: PLC0415  an extra
    adapters = {name: Path(path) for name, path in options.loras}
    try:
        add_adapters(options.repository, adapters)
    except ExportError as error:
        raise DarkroomError(str(error)) from error
    print(f"{options.repository}: has {', '.join(adapters)}; a server takes them at its next start")
    return 0


def _random_checkpoint(options: argparse.Namespace) -> int:
    with _extra("export"):
        from darkroom_export.random_checkpoint import (  # noqa: PLC0415  its needs are an extra
            make_random_checkpoint,
        )
    with terminal_progress("making random weights"):
        try:
            make_random_checkpoint(options.architecture, options.directory, options.seed)
        except ValueError as error:
            raise DarkroomError(str(error)) from error
    print(f"{options.directory}: {options.architecture} with random weights")
    return 0


def _named(text: str) -> tuple[str, str]:
    """The two sides of NAME=PATH."""
    name, _, path = text.partition("=")
    if not name or not path:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=PATH")
    return name, path


def _once(option: str, pairs: list[tuple[str, str]]) -> dict[str, str]:
    named = dict(pairs)
    if len(named) < len(pairs):
        raise DarkroomError(f"{option}: every name may be given once")
    return named


def _scaled(text: str) -> tuple[str, float]:
    """The two sides of PATH:SCALE, the second 1 where there is none."""
    path, separator, scale = text.rpartition(":")
    try:
        return (path, float(scale)) if separator else (text, 1.0)
    except ValueError:
        return text, 1.0


def _bytes(text: str) -> int:
    """A size such as 64MB; units are powers of 1024."""
    match = re.fullmatch(r"(\d+)(KB|MB|GB)", text.upper())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 512KB, 64MB or 1GB")
    return int(match[1]) * {"KB": 2**10, "MB": 2**20, "GB": 2**30}[match[2]]


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _max_rows(text: str) -> str:
    if text != "auto" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of rows, or auto")
    return text


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return seconds


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class _extra:  # noqa: N801  reads as a statement
    """Turns a missing package into the command that installs it."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        if isinstance(error, ModuleNotFoundError):
            raise DarkroomError(
                f"this needs the package {error.name}: pip install 'darkroom[{self._name}]'"
            ) from error


if __name__ == "__main__":
    sys.exit(main())
