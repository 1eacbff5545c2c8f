"""What the benchmarks' command lines have in common."""

import argparse
from pathlib import Path


def command_parser(doc: str) -> argparse.ArgumentParser:
    """A parser for `[REPOSITORY] [--seed N] [--output FILE]`, described by a script's docstring."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    default = Path(__file__).resolve().parent.parent / "build" / "shapes"
    parser.add_argument("repository", nargs="?", type=Path, default=default)
    parser.add_argument("--seed", type=int, default=0, help="of the workload")
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: in results/")
    return parser


def positive(text: str) -> int:
    """A whole number above 0, for argparse."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)
