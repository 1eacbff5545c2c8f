"""`darkroom probe`: whether a server makes pictures."""

import argparse
import time
from typing import Any

from darkroom.cli.arguments import add_model, add_url, seconds
from darkroom.client import Client
from darkroom.exceptions import DarkroomError, QueueFull, RequestTimeout
from darkroom.picture import Picture
from darkroom.probe import probe


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "probe", help="ask a server for its smallest picture, to see whether it works"
    )
    add_url(parser)
    add_model(parser)
    parser.add_argument("--timeout", type=seconds, default=60.0, metavar="SECONDS")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    start = time.monotonic()
    try:
        picture = _smallest_picture(options, start + options.timeout)
    except QueueFull as error:
        print(f"{options.url} is alive: {error}")
    except RequestTimeout:
        waited = time.monotonic() - start
        raise DarkroomError(f"{options.url}: no picture within {waited:.1f} s") from None
    else:
        print(
            f"{options.url} is alive: it made a picture of {picture.width}x{picture.height} "
            f"in {time.monotonic() - start:.2f} s"
        )
    return 0


def _smallest_picture(options: argparse.Namespace, give_up_at: float) -> Picture:
    with Client(options.url, model=options.model, timeout=options.timeout) as client:
        model = client.info(options.model)
        try:
            size, mode = model.limits["min_size"], model.modes[0]
        except LookupError:
            raise DarkroomError(f"{options.url}: tells no size or mode of {model.model}") from None
        return probe(client, max(0.0, give_up_at - time.monotonic()), size, mode)
