"""`darkroom build`: have an exported repository run by another backend."""

import argparse
import sys
from pathlib import Path
from typing import Any

from darkroom.cli.arguments import add_repeatable, size_in_bytes
from darkroom.cli.extra import extra
from darkroom.exceptions import DarkroomError
from darkroom.progress import terminal_progress

_TENSORRT, _ONNXRUNTIME = "tensorrt", "onnxruntime"
_PROFILES = ("preset", "profile", "batch", "height", "width", "prompt_multiples", "pictures")
_ENGINES = (
    "version_compatible",
    "weight_streaming",
    "optimization_level",
    "workspace",
    "tolerance",
    "timing_cache",
    "no_cuda_graphs",
)
_ACCELERATION = ("device", "accelerator", "engine_cache")


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "build", help="have an exported repository run by another backend, such as TensorRT"
    )
    parser.add_argument("repository", type=Path, metavar="REPOSITORY")
    parser.add_argument(
        "--backend",
        required=True,
        choices=["python", _ONNXRUNTIME, _TENSORRT],
        help="python is ONNX Runtime in a Python model, for CPUs; the others are Triton's own",
    )
    parser.add_argument(
        "--gpus",
        type=_indexes,
        metavar="N,N",
        help="the server's GPUs that get an instance of each network; by default all",
    )
    _add_profiles(parser)
    _add_engines(parser)
    _add_acceleration(parser)
    parser.set_defaults(run=_run)


def _add_profiles(parser: argparse.ArgumentParser) -> None:
    group: Any = parser.add_argument_group(
        "what engines are built for",
        "Each is one number, or MIN:OPT:MAX; engines are fastest at OPT. See docs/tensorrt.md.",
    )
    group.add_argument(
        "--preset",
        metavar="NAME",
        help="native: the checkpoint's own size, some rows; buckets: the same, a profile for every "
        "few rows; dynamic: all sizes; max-batch: its own size, all rows; default: native",
    )
    add_repeatable(
        group,
        "--profile",
        str,
        "batch=B,height=H,width=W",
        "a profile in place of the preset's, of which is taken what is left out",
    )
    group.add_argument("--batch", metavar="B", help="rows of the denoiser, in all profiles")
    group.add_argument("--height", metavar="H", help="pixels, in all profiles")
    group.add_argument("--width", metavar="W", help="pixels, in all profiles")
    group.add_argument(
        "--prompt-multiples", metavar="M", help="chunks of 77 tokens that a prompt may take"
    )
    group.add_argument(
        "--pictures", metavar="P", help="that the VAE decodes at once; default: 1, as engines do"
    )


def _add_engines(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("how TensorRT builds them")
    group.add_argument(
        "--version-compatible",
        action="store_true",
        help="let newer TensorRTs of the same major version run them",
    )
    group.add_argument(
        "--weight-streaming",
        action="store_true",
        help="let what runs them keep weights in the host's memory; Triton does not",
    )
    group.add_argument(
        "--optimization-level", type=int, metavar="N", help="0 to 5, of which 5 takes longest"
    )
    group.add_argument(
        "--workspace", type=size_in_bytes, metavar="SIZE", help="memory of a kernel: 4GB, say"
    )
    group.add_argument(
        "--tolerance",
        type=float,
        metavar="X",
        help="how far they may be from their graphs, of an output's range; default: the export's",
    )
    group.add_argument(
        "--timing-cache",
        type=Path,
        metavar="FILE",
        help="where measured kernels are kept for the next build; default: in the repository",
    )
    group.add_argument(
        "--no-cuda-graphs", action="store_true", help="do not capture the denoiser's calls"
    )


def _add_acceleration(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what ONNX Runtime computes with")
    group.add_argument("--device", choices=["gpu", "cpu"], help="default: gpu")
    group.add_argument(
        "--accelerator",
        choices=["cuda", "tensorrt"],
        help="tensorrt builds engines when the server starts; default: cuda",
    )
    group.add_argument(
        "--engine-cache", metavar="FOLDER", help="where the server keeps those engines"
    )


def _run(options: argparse.Namespace) -> int:
    with extra("tensorrt"):
        from darkroom_export import ExportError  # noqa: PLC0415  its needs are an extra
        from darkroom_export.backend import Backend  # noqa: PLC0415
        from darkroom_export.build import BuildOptions, build_repository  # noqa: PLC0415
        from darkroom_export.profiles import Wishes  # noqa: PLC0415
        from darkroom_export.tensorrt import EngineOptions  # noqa: PLC0415
    check_options(options)
    given = {name: getattr(options, name) for name in _PROFILES if is_given(options, name)}
    try:
        rows = build_repository(
            options.repository,
            BuildOptions(
                backend=Backend(options.backend),
                wishes=Wishes(profiles=given.pop("profile", ()), **given),
                engine=EngineOptions(
                    version_compatible=options.version_compatible,
                    weight_streaming=options.weight_streaming,
                    optimization_level=options.optimization_level,
                    workspace_bytes=options.workspace,
                    timing_cache=options.timing_cache,
                    tolerance=options.tolerance,
                ),
                with_cuda_graphs=not options.no_cuda_graphs,
                gpus=options.gpus or (),
                is_on_gpu=options.device != "cpu",
                accelerator=options.accelerator or "cuda",
                engine_cache=options.engine_cache or "",
            ),
            progress=terminal_progress,
            tell=_tell,
        )
    except ExportError as error:
        raise DarkroomError(str(error)) from error
    print(
        f"{options.repository}: runs on {options.backend}, up to {rows} rows a call; next: "
        f"darkroom serve {options.repository}"
    )
    return 0


def check_options(options: argparse.Namespace) -> None:
    """Refuse options that the chosen backend would not heed.

    Raises:
        DarkroomError: names one, and the backend that it is for.
    """
    accelerates = options.backend == _ONNXRUNTIME and options.accelerator == "tensorrt"
    for names, is_heeded, needed in (
        (_ENGINES, options.backend == _TENSORRT, f"--backend {_TENSORRT}"),
        (_ACCELERATION, options.backend == _ONNXRUNTIME, f"--backend {_ONNXRUNTIME}"),
        (("engine_cache",), accelerates, "--accelerator tensorrt"),
        (("gpus",), options.backend != "python", f"--backend {_TENSORRT} or {_ONNXRUNTIME}"),
        (
            _PROFILES,
            options.backend == _TENSORRT or accelerates,
            f"--backend {_TENSORRT}, or --accelerator tensorrt",
        ),
    ):
        for name in names:
            if is_given(options, name) and not is_heeded:
                raise DarkroomError(f"--{name.replace('_', '-')}: is for {needed}")
    if accelerates and len(options.profile) > 1:
        raise DarkroomError("--profile: ONNX Runtime's engines have one")
    if options.device == "cpu" and (options.accelerator or options.gpus):
        raise DarkroomError("--device: cpu has neither --accelerator nor --gpus")


def is_given(options: argparse.Namespace, name: str) -> bool:
    value = getattr(options, name)
    # 0 is a value.
    return value is not None and value is not False and value != []


def _indexes(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.isdecimal() for part in parts) or len(set(parts)) < len(parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not numbers of GPUs such as 0,1, each once")
    return tuple(map(int, parts))


def _tell(line: str) -> None:
    # Over the line of the task, which moves.
    print(f"\r  {line}", file=sys.stderr, flush=True)
