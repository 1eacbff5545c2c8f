"""Serve every family from a real tritonserver, and compare its pictures with diffusers'.

python -m equivalence [--output docs/equivalence.md] [ARCHITECTURE ...]
"""
# ruff: noqa: T201  a command prints

import argparse
import sys
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from darkroom import Client
from darkroom.progress import terminal_progress
from darkroom.served_models import Source
from darkroom.server import Server, free_ports
from equivalence.cases import CASES, Case
from equivalence.compare import Comparison, compare
from equivalence.reference import Reference
from equivalence.workshop import Workshop

FOLDER = Path(__file__).resolve().parent.parent / "build" / "equivalence"
TIMEOUT_S = 300.0
_PACKAGES = ("torch", "diffusers", "transformers", "onnxruntime")
_INTRODUCTION = """\
# Served pictures against diffusers'

Made by `make equivalence`: every family in every mode, served by a real tritonserver from fp32 ONNX
networks on the CPU, against the diffusers pipeline with the same weights, noise and scheduler
config. The checkpoints are small ones of the real classes with random weights. Differences are in
levels of 255; at most 1 on average is allowed. The last column, the mean difference to the picture
of another seed, shows that the measure can tell pictures apart.

diffusers' inpainting pipeline of Stable Diffusion 3 decodes without the VAE's shift (0.42); its
latents were decoded as its other pipelines decode them.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison; returns the exit status, 1 if a picture differs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("architectures", nargs="*", metavar="ARCHITECTURE", help="default: all")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the table as Markdown")
    options = parser.parse_args(arguments)
    wanted = options.architectures or list(dict.fromkeys(case.architecture for case in CASES))
    workshop = Workshop(FOLDER, terminal_progress)
    reference = Reference(*workshop.reference_folders())
    comparisons = []
    for architecture in wanted:
        for comparison in _compare_all(architecture, workshop, reference):
            print(_row(comparison), flush=True)
            comparisons.append(comparison)
    if options.output:
        options.output.write_text(_document(comparisons))
    num_different = sum(not comparison.is_equal for comparison in comparisons)
    print(f"{len(comparisons)} compared, {num_different} differ")
    return 1 if num_different else 0


def _compare_all(
    architecture: str, workshop: Workshop, reference: Reference
) -> Iterator[Comparison]:
    """Of one checkpoint, and of those that finish its pictures, in one server."""
    cases = [case for case in CASES if case.architecture == architecture]
    names = [architecture, *{case.refiner for case in cases if case.refiner}]
    sources = [Source(workshop.repository(name), name) for name in names]
    with Server(sources, free_ports(), terminal_progress) as server:
        clients = {name: Client(server.grpc_url, timeout=TIMEOUT_S, model=name) for name in names}

        def generate(name: str, prompt: str, **options: Any) -> Sequence[Any]:
            client = clients[name]
            if options.pop("output_format", None) == "latent":
                return [client.generate_latents(prompt, **options)]
            count = options.pop("num_images_per_prompt", 1)
            return client.generate(prompt, num_images_per_prompt=count, **options)

        for case in cases:
            yield compare(case, reference, generate)


def _row(comparison: Comparison) -> str:
    case: Case = comparison.case
    verdict = "" if comparison.is_equal else " **differs** |"
    return (
        f"| {case.architecture} | {case.name} | {case.pipeline} | {case.sampler} "
        f"| {comparison.mean:.4f} | {comparison.max:.0f} | {comparison.other:.1f} |{verdict}"
    )


def _document(comparisons: Sequence[Comparison]) -> str:
    versions = ", ".join(f"{package} {metadata.version(package)}" for package in _PACKAGES)
    head = "| checkpoint | case | diffusers' pipeline | sampler | mean | max | other seed |"
    rule = "|---|---|---|---|---|---|---|"
    rows = [_row(comparison) for comparison in comparisons]
    return "\n".join([_INTRODUCTION, f"With {versions}.", "", head, rule, *rows, ""])


if __name__ == "__main__":
    sys.exit(main())
