"""`darkroom plan`: what hardware a checkpoint needs."""

import argparse
import json
from typing import Any

from darkroom.cli.arguments import count
from darkroom.cli.extra import extra
from darkroom.exceptions import DarkroomError


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "plan", help="tell what hardware a checkpoint needs, and what to expect of it"
    )
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="a diffusers folder, of which the configs are enough, or an architecture such as "
        "sd15, sd21 or sdxl",
    )
    parser.add_argument("--gpu", metavar="NAME", help="L40S, say; all known ones if left out")
    for side in ("width", "height"):
        parser.add_argument(f"--{side}", type=count, metavar="PIXELS", help="default: its own size")
    parser.add_argument(
        "--precision",
        choices=["fp32", "fp16", "bf16"],
        default="fp16",
        help="what the networks compute in; default: %(default)s",
    )
    parser.add_argument("--steps", type=count, metavar="N", help="of a picture")
    parser.add_argument(
        "--rows",
        type=count,
        metavar="N",
        help="rows of a call: a picture takes two with guidance; default: 16, or what fits",
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="everything, in bytes and seconds")
    form.add_argument("--markdown", action="store_true", help="the tables, for a document")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    with extra("export"):
        from darkroom_export import ExportError, Precision  # noqa: PLC0415  its needs are an extra
        from darkroom_export.plan import make_plan, plan_gpus  # noqa: PLC0415
        from darkroom_export.plan_gpus import GPUS, find_gpu  # noqa: PLC0415
        from darkroom_export.plan_text import (  # noqa: PLC0415
            plan_markdown,
            plan_record,
            plan_text,
        )
    try:
        gpus = list(GPUS.values()) if options.gpu is None else [find_gpu(options.gpu)]
        plan = make_plan(
            options.checkpoint,
            width=options.width,
            height=options.height,
            precision=Precision(options.precision),
            num_inference_steps=options.steps,
        )
        planned = plan_gpus(plan, gpus, options.rows)
    except ExportError as error:
        raise DarkroomError(str(error)) from error
    if options.json:
        print(json.dumps(plan_record(plan, planned), indent=2))
    else:
        print((plan_markdown if options.markdown else plan_text)(plan, planned))
    return 0
