"""`darkroom cancel`: end a request by its id."""

import argparse
from typing import Any

from darkroom.cli.arguments import add_model, add_url
from darkroom.client import Client
from darkroom.exceptions import DarkroomError


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("cancel", help="cancel a request that waits or runs")
    parser.add_argument("request_id", metavar="REQUEST_ID")
    add_url(parser)
    add_model(parser)
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    with Client(options.url, model=options.model) as client:
        if not client.cancel(options.request_id):
            raise DarkroomError(f"{options.request_id}: no such request is waiting or running")
    print(f"{options.request_id}: cancelled")
    return 0
