"""The `darkroom` command."""

import argparse
import re
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from darkroom import __version__
from darkroom.client import Client
from darkroom.exceptions import DarkroomError
from darkroom.progress import terminal_progress

EXIT_FAILED = 1


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
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="darkroom", description="Stable Diffusion on NVIDIA Triton."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_generate(commands)
    _add_serve(commands)
    _add_export(commands)
    _add_random_checkpoint(commands)
    return parser


def _add_generate(commands: Any) -> None:
    parser = commands.add_parser("generate", help="ask a server for a picture and save it")
    parser.add_argument("prompt")
    parser.add_argument("-o", "--output", type=Path, default=Path("picture.png"), metavar="FILE")
    parser.add_argument("--url", default="localhost:8001", help="default: %(default)s, gRPC")
    parser.add_argument("--negative-prompt")
    parser.add_argument("--num-inference-steps", type=int, metavar="N")
    parser.add_argument("--guidance-scale", type=float, metavar="X")
    parser.add_argument("--seed", type=int, metavar="N")
    parser.add_argument("--width", type=int, metavar="PIXELS")
    parser.add_argument("--height", type=int, metavar="PIXELS")
    parser.add_argument("--sampler")
    parser.add_argument("--timeout", type=float, default=600.0, metavar="SECONDS")
    parser.set_defaults(run=_generate)


def _add_serve(commands: Any) -> None:
    parser = commands.add_parser("serve", help="serve an exported repository on this machine")
    parser.add_argument("repository", type=Path, metavar="REPOSITORY")
    parser.add_argument("--host", default="127.0.0.1", help="default: %(default)s")
    for name, number in (("http", 8000), ("grpc", 8001), ("metrics", 8002)):
        parser.add_argument(f"--{name}-port", type=int, default=number, metavar="PORT")
    parser.add_argument(
        "--response-cache",
        type=_bytes,
        default=0,
        metavar="SIZE",
        help="keep answers, to give them again to equal requests: 64MB, say; off by default",
    )
    parser.set_defaults(run=_serve)


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
    parser.set_defaults(run=_export)


def _add_random_checkpoint(commands: Any) -> None:
    parser = commands.add_parser(
        "random-checkpoint", help="make a checkpoint with random weights, to test with"
    )
    parser.add_argument("architecture", metavar="ARCHITECTURE", help="sd15 or tiny-sd15")
    parser.add_argument("directory", type=Path, metavar="FOLDER")
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(run=_random_checkpoint)


def _generate(options: argparse.Namespace) -> int:
    # Refused before the work, not after it.
    output: Path = options.output
    if not output.parent.is_dir():
        raise DarkroomError(f"{output.parent}: no such folder to save the picture in")
    if output.is_dir():
        raise DarkroomError(f"{output}: is a folder, not a file to save the picture in")
    if output.suffix.lower() not in Image.registered_extensions():
        raise DarkroomError(f"{output}: no picture format has the suffix {output.suffix!r}")
    with Client(options.url) as client, terminal_progress("generating"):
        picture = client.generate(
            options.prompt,
            negative_prompt=options.negative_prompt,
            num_inference_steps=options.num_inference_steps,
            guidance_scale=options.guidance_scale,
            seed=options.seed,
            width=options.width,
            height=options.height,
            sampler=options.sampler,
            timeout=options.timeout,
        )
    for note in picture.notes:
        print(f"note: {note}", file=sys.stderr)
    try:
        if output.suffix.lower() == ".png":
            # As it came, with the provenance that the server wrote into it.
            output.write_bytes(picture.encoded)
        else:
            picture.save(output)
    except (OSError, ValueError) as error:
        raise DarkroomError(f"{output}: {error}") from None
    print(f"{options.output}: {picture.width}x{picture.height}, seed {picture.seed}")
    return 0


def _serve(options: argparse.Namespace) -> int:
    from darkroom.server import Ports, Server  # noqa: PLC0415  its needs are an extra

    ports = Ports(options.host, options.http_port, options.grpc_port, options.metrics_port)
    server = Server(options.repository, ports, terminal_progress, options.response_cache)
    is_stopping = threading.Event()
    try:
        # An exception is what interrupts a start; once the server runs, a flag is safer: one
        # raised inside somebody's __del__ would be lost, and the signal with it.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        server.start()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: is_stopping.set())
        print(
            f"ready: {options.repository} at gRPC {server.grpc_url}, HTTP {server.http_url}, "
            f"metrics {server.metrics_url}; Ctrl-C stops it",
            flush=True,
        )
        server.wait(is_stopping)
        print("stopping", file=sys.stderr)
    finally:
        server.stop()
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
        )
    except ExportError as error:
        raise DarkroomError(str(error)) from error
    state = "exported and verified" if is_new else "up to date"
    print(f"{options.repository}: {state}; next: darkroom serve {options.repository}")
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


def _bytes(text: str) -> int:
    """A size such as 64MB; units are powers of 1024."""
    match = re.fullmatch(r"(\d+)(KB|MB|GB)", text.upper())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 512KB, 64MB or 1GB")
    return int(match[1]) * {"KB": 2**10, "MB": 2**20, "GB": 2**30}[match[2]]


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
