"""Whether the pictures are right: against diffusers, and against the same without neighbours."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.gpu.bench import GUIDANCE_SCALE, OFF, Bench, read_latents, read_levels
from benchmarks.gpu.grouping import is_guided
from benchmarks.gpu.peers import ExactArithmetic, Pipeline
from benchmarks.gpu.service import ANSWER_TIMEOUT_S
from benchmarks.gpu.summary import compare_latents, compare_pictures
from benchmarks.workload import Request, make_requests

Made = tuple[NDArray[np.float32], NDArray[np.uint8]]
"""A request's latents (C, h, w), and its picture (H, W, 3)."""


def check(bench: Bench) -> dict[str, Any]:
    """Our loop, and diffusers in the same precision, against diffusers in float32."""
    scale = bench.scale
    requests = make_requests(
        scale.num_compared,
        seed=1,
        steps=(scale.num_steps, scale.num_steps),
        guidance_scales=(GUIDANCE_SCALE, OFF),
    )
    with ExactArithmetic(), bench.pipeline(torch.float32) as pipeline:
        reference = _by(pipeline, requests)
    result: dict[str, Any] = {"reference": "diffusers in float32", "num_steps": scale.num_steps}
    if bench.model.precision != "fp32":
        with bench.pipeline(bench.model.dtype) as pipeline:
            made = _by(pipeline, requests)
        result[f"diffusers in {bench.model.precision}"] = _compare(requests, made, reference)
    made = [(bench.latents(request), bench.levels(request)) for request in requests]
    result["ours"] = _compare(requests, made, reference)
    return result


def exact(bench: Bench) -> dict[str, Any]:
    """The same requests alone, alone again, and all in one batch."""
    scale, ours = bench.scale, bench.ours()
    requests = make_requests(
        max(2, min(2 * scale.num_compared, bench.max_rows // 2)),
        seed=2,
        steps=scale.mixed_steps,
        guidance_scales=(GUIDANCE_SCALE, OFF),
    )
    alone = [(bench.latents(request), bench.levels(request)) for request in requests]
    again = [(bench.latents(request), bench.levels(request)) for request in requests]
    together: list[list[bytes]] = []
    for output_format in ("latent", "png"):
        with ours.at_once():
            futures = [ours.submit_as(request, output_format) for request in requests]
        together.append([future.result(ANSWER_TIMEOUT_S).picture for future in futures])
    batched = [
        (read_latents(latents), read_levels(picture))
        for latents, picture in zip(*together, strict=True)
    ]
    return {
        "num_requests": len(requests),
        "alone again": _compare(requests, again, alone),
        "batched": _compare(requests, batched, alone),
    }


def _by(pipeline: Pipeline, requests: Sequence[Request]) -> list[Made]:
    return [(pipeline.latents(request), pipeline.levels(request)) for request in requests]


def _compare(
    requests: Sequence[Request], made: Sequence[Made], reference: Sequence[Made]
) -> list[dict[str, Any]]:
    return [
        {
            "num_steps": request.num_inference_steps,
            "is_guided": is_guided(request),
            "latents": compare_latents(latents, reference_latents),
            "picture": compare_pictures(picture, reference_picture),
        }
        for request, (latents, picture), (reference_latents, reference_picture) in zip(
            requests, made, reference, strict=True
        )
    ]
