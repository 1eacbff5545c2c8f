"""`darkroom info`: what a server's models are and can do."""

import argparse
import json
from typing import Any

from darkroom.cli.arguments import add_url
from darkroom.client import Client
from darkroom.model_text import model_text


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("info", help="tell what a server's models are and can do")
    parser.add_argument("model", nargs="?", metavar="MODEL", help="all of them if left out")
    add_url(parser)
    parser.add_argument("--json", action="store_true", help="all that the server says, as JSON")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
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
