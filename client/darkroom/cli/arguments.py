"""What several commands take, and the types of their arguments."""

import argparse
import math
import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from darkroom import protocol


def add_url(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", default="localhost:8001", help="default: %(default)s, gRPC")


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        default=protocol.MODEL,
        help="which of the server's models to ask, see `darkroom info`; default: %(default)s",
    )


def add_repeatable(
    parser: argparse.ArgumentParser,
    option: str,
    read: Callable[[str], Any],
    metavar: str,
    described: str,
) -> None:
    """An option that may be given several times, each read by `read`."""
    parser.add_argument(
        option,
        action="append",
        default=[],
        type=read,
        metavar=metavar,
        help=f"{described}; may be repeated",
    )


def named(text: str) -> tuple[str, str]:
    """The two sides of NAME=PATH."""
    name, _, path = text.partition("=")
    if not name or not path:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=PATH")
    return name, path


def size_in_bytes(text: str) -> int:
    """A size such as 64MB; units are powers of 1024."""
    match = re.fullmatch(r"(\d+)(KB|MB|GB)", text.upper())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 512KB, 64MB or 1GB")
    return int(match[1]) * {"KB": 2**10, "MB": 2**20, "GB": 2**30}[match[2]]


def count(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def rising_counts(text: str) -> str:
    numbers = text.split(",")
    if not all(number.isdecimal() for number in numbers) or not all(
        int(low) < int(high) for low, high in pairwise(["0", *numbers])
    ):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a rising list of whole numbers above 0, such as 1,2,4"
        )
    return text


def device(text: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is none of auto, cpu, cuda, cuda:N")
    return text


def max_rows(text: str) -> str:
    if text != "auto" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of rows, or auto")
    return text


def seconds(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return number
