"""`darkroom export` and what goes with it: adapters, and checkpoints to test with."""

import argparse
from pathlib import Path
from typing import Any

from darkroom.cli import scaled
from darkroom.cli.arguments import add_repeatable, named
from darkroom.cli.extra import extra
from darkroom.exceptions import DarkroomError
from darkroom.progress import terminal_progress


def add_parser(commands: Any) -> None:
    """The parsers of all three commands."""
    _add_export(commands)
    _add_add_adapter(commands)
    _add_random_checkpoint(commands)


def _add_export(commands: Any) -> None:
    parser = commands.add_parser("export", help="turn a checkpoint into a verified repository")
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="a diffusers folder, .safetensors file or hub id"
    )
    parser.add_argument("repository", type=Path, metavar="REPOSITORY")
    parser.add_argument(
        "--backend",
        choices=["python", "torch"],
        default="python",
        help="what runs the networks: ONNX Runtime, or PyTorch; default: %(default)s",
    )
    parser.add_argument(
        "--precision",
        choices=["fp32", "fp16", "bf16"],
        default="fp32",
        help="what the networks compute in, bf16 with the backend torch; default: %(default)s",
    )
    parser.add_argument(
        "--device",
        choices=["cpu", "cuda"],
        default="cpu",
        help="where PyTorch computes what they are compared with; default: %(default)s",
    )
    parser.add_argument(
        "--config", metavar="FOLDER", help="the architecture of a single .safetensors file"
    )
    parser.add_argument("--force", action="store_true", help="replace another repository")
    add_repeatable(parser, "--controlnet", named, "NAME=PATH", "export a ControlNet too, as NAME")
    parser.add_argument(
        "--safety-checker", action="store_true", help="export the checkpoint's safety checker too"
    )
    add_repeatable(
        parser,
        "--lora",
        scaled.variant,
        "[NAME=]PATH[:SCALE]",
        "a LoRA in further networks, that requests ask for as the variant NAME, by default the "
        "file's name; those of one NAME are used together",
    )
    add_repeatable(
        parser,
        "--adapter",
        named,
        "NAME=PATH",
        "a LoRA that requests may ask for as NAME, each for its own share",
    )
    add_repeatable(
        parser,
        "--fuse-lora",
        scaled.lora,
        "PATH[:SCALE]",
        "a LoRA that becomes part of the weights",
    )
    parser.add_argument("--default-steps", type=int, metavar="N", help="if a request does not say")
    parser.add_argument("--default-guidance-scale", type=float, metavar="X")
    parser.add_argument("--default-sampler", metavar="SAMPLER")
    parser.set_defaults(run=_export)


def _add_add_adapter(commands: Any) -> None:
    parser = commands.add_parser(
        "add-adapter",
        help="add adapters to a repository that was exported with some, in seconds",
    )
    parser.add_argument("repository", type=Path, metavar="REPOSITORY")
    parser.add_argument("adapters", nargs="+", type=named, metavar="NAME=PATH")
    parser.set_defaults(run=_add_adapter)


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


def _export(options: argparse.Namespace) -> int:
    with extra("export"):
        from darkroom_export import (  # noqa: PLC0415  its needs are an extra
            Backend,
            ExportError,
            Precision,
            export_checkpoint,
        )
    try:
        is_new = export_checkpoint(
            options.checkpoint,
            options.repository,
            backend=Backend(options.backend),
            precision=Precision(options.precision),
            config=options.config,
            force=options.force,
            progress=terminal_progress,
            controlnets=_once("--controlnet", options.controlnet),
            safety_checker=options.safety_checker,
            loras=_once("--adapter", options.adapter),
            variants={
                name: [file for given, file in options.lora if given == name]
                for name, _ in options.lora
            },
            fused_loras=options.fuse_lora,
            num_inference_steps=options.default_steps,
            guidance_scale=options.default_guidance_scale,
            sampler=options.default_sampler,
            device=options.device,
        )
    except ExportError as error:
        raise DarkroomError(str(error)) from error
    state = "exported and verified" if is_new else "up to date"
    print(f"{options.repository}: {state}; next: darkroom serve {options.repository}")
    return 0


def _add_adapter(options: argparse.Namespace) -> int:
    with extra("export"):
        from darkroom_export import ExportError, add_adapters  # noqa: PLC0415  an extra
    adapters = {name: Path(path) for name, path in _once("add-adapter", options.adapters).items()}
    try:
        add_adapters(options.repository, adapters)
    except ExportError as error:
        raise DarkroomError(str(error)) from error
    print(f"{options.repository}: has {', '.join(adapters)}; a server takes them at its next start")
    return 0


def _random_checkpoint(options: argparse.Namespace) -> int:
    with extra("export"):
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


def _once(option: str, pairs: list[tuple[str, str]]) -> dict[str, str]:
    by_name = dict(pairs)
    if len(by_name) < len(pairs):
        raise DarkroomError(f"{option}: every name may be given once")
    return by_name
