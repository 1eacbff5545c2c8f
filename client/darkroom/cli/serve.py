"""`darkroom serve`: a tritonserver on this machine, watched over until it is stopped."""

import argparse
import signal
import sys
from pathlib import Path
from typing import Any

from darkroom.cli import exit_status
from darkroom.cli.arguments import (
    add_repeatable,
    count,
    device,
    max_rows,
    rising_counts,
    seconds,
    size_in_bytes,
)
from darkroom.progress import terminal_progress
from darkroom.served_models import Source

LOW_PROBE_INTERVAL_S = 120.0
LOW_PROBE_TIMEOUT_S = 600.0
_NETWORKS = {"in-process": "1", "triton": "0"}


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("serve", help="serve exported repositories on this machine")
    parser.add_argument(
        "repositories",
        nargs="+",
        metavar="[NAME=]REPOSITORY",
        help="NAME is what its model is called; of those without, the first is stable_diffusion, "
        "and the others are called as their folders",
    )
    parser.add_argument("--host", default="127.0.0.1", help="default: %(default)s")
    for name, number in (("http", 8000), ("grpc", 8001), ("metrics", 8002)):
        parser.add_argument(f"--{name}-port", type=int, default=number, metavar="PORT")
    parser.add_argument(
        "--max-rows",
        type=max_rows,
        metavar="N",
        help="rows of one call of the denoiser, or auto: as many as fit into memory",
    )
    parser.add_argument(
        "--memory-profile",
        choices=["low", "balanced", "full"],
        default="full",
        help="what to save memory for, at the price of time; default: %(default)s, nothing",
    )
    parser.add_argument(
        "--networks",
        choices=list(_NETWORKS),
        help="where networks that were exported for PyTorch run: in the engine's process, which is "
        "the default and the faster, or as models of Triton's",
    )
    parser.add_argument(
        "--device",
        type=device,
        metavar="DEVICE",
        help="of networks in the engine's process: cpu, cuda, cuda:N, or auto, a GPU if there is "
        "one; default: auto",
    )
    parser.add_argument(
        "--compile", action="store_true", help="let torch.compile make their kernels, in minutes"
    )
    parser.add_argument(
        "--row-buckets",
        type=rising_counts,
        metavar="N,N,...",
        help="the numbers of rows that their CUDA graphs are recorded for",
    )
    parser.add_argument(
        "--no-cuda-graphs", action="store_true", help="launch their kernels one by one"
    )
    parser.add_argument(
        "--num-engines",
        type=count,
        metavar="N",
        help="running batches, one for each GPU; default: 1",
    )
    parser.add_argument(
        "--safety-checker",
        choices=["off", "flag", "blank"],
        help="what happens to pictures that the checkpoint's safety checker finds not safe",
    )
    parser.add_argument(
        "--response-cache",
        type=size_in_bytes,
        default=0,
        metavar="SIZE",
        help="keep answers, to give them again to equal requests: 64MB, say; off by default",
    )
    parser.add_argument(
        "--log-file",
        type=Path,
        metavar="FILE",
        help="append tritonserver's log to this file; without it the log goes with the server",
    )
    add_repeatable(
        parser,
        "--trace-config",
        str,
        "SETTING",
        "a setting of Triton's tracing, such as mode=opentelemetry",
    )
    parser.add_argument(
        "--start-timeout",
        type=seconds,
        default=600.0,
        metavar="SECONDS",
        help="give up on a start that takes longer; default: %(default)g",
    )
    parser.add_argument(
        "--probe-timeout",
        type=seconds,
        default=120.0,
        metavar="SECONDS",
        help="restart a server that makes no probe picture in this time; default: %(default)g",
    )
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    # Its needs are an extra.
    from darkroom.server import Ports, ServeInterrupted, Server  # noqa: PLC0415
    from darkroom.supervisor import Patience, Supervisor  # noqa: PLC0415

    server = Server(
        [Source.parse(text) for text in options.repositories],
        Ports(options.host, options.http_port, options.grpc_port, options.metrics_port),
        terminal_progress,
        options.response_cache,
        log_file=options.log_file,
        trace_config=options.trace_config,
        engine_parameters=engine_parameters(options),
        start_timeout_s=options.start_timeout,
    )

    def interrupt(*_: object) -> None:
        # A flag, since an exception raised inside somebody's __del__ would be lost.
        server.is_stopping = True

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, interrupt)
        server.start()
        models = ", ".join(f"{model.name} ({model.repository})" for model in server.models)
        print(
            f"ready: {models} at gRPC {server.grpc_url}, HTTP {server.http_url}, "
            f"metrics {server.metrics_url}; Ctrl-C stops it",
            flush=True,
        )
        patience = Patience(probe_timeout_s=options.probe_timeout)
        if options.memory_profile == "low":
            # There a picture loads networks, after those that are in use had their turn.
            patience = Patience(
                probe_interval_s=LOW_PROBE_INTERVAL_S,
                probe_timeout_s=max(options.probe_timeout, LOW_PROBE_TIMEOUT_S),
            )
        Supervisor(server, _tell, patience).run()
        _tell("stopping")
    except ServeInterrupted:
        return exit_status.INTERRUPTED
    finally:
        server.stop()
    return 0


def engine_parameters(options: argparse.Namespace) -> dict[str, str]:
    """The engines' settings that were chosen; what is left out is as the repositories have it."""
    memory_profile = None if options.memory_profile == "full" else options.memory_profile
    chosen = {
        "max_rows": options.max_rows,
        "memory_profile": memory_profile,
        "safety_checker": options.safety_checker,
        "in_process": _NETWORKS[options.networks] if options.networks else None,
        "device": options.device,
        "compile": "1" if options.compile else None,
        "row_buckets": options.row_buckets,
        "cuda_graphs": "0" if options.no_cuda_graphs else None,
        "num_engines": str(options.num_engines) if options.num_engines else None,
    }
    return {key: value for key, value in chosen.items() if value is not None}


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
