"""The `darkroom` command."""

import argparse
import sys
from collections.abc import Callable, Sequence

from darkroom import __version__
from darkroom.cli import build, cancel, exit_status, export, generate, info, plan, probe, serve
from darkroom.exceptions import DarkroomError

__all__ = ["main", "make_parser"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    options = make_parser().parse_args(arguments)
    run: Callable[[argparse.Namespace], int] = options.run
    try:
        return run(options)
    except DarkroomError as error:
        print(f"darkroom: {error}", file=sys.stderr)
        return exit_status.FAILED
    except KeyboardInterrupt:
        return exit_status.INTERRUPTED


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="darkroom", description="Stable Diffusion on NVIDIA Triton."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (generate, info, cancel, serve, probe, export, build, plan):
        command.add_parser(commands)
    return parser
