"""What the benchmarks ask for: requests that differ, and are the same in every run."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from darkroom import Options

_SIZES = ("small", "large")
_COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "white", "black")
_SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")


@dataclass(frozen=True)
class Request:
    """One picture to ask for; None leaves a field to the server's default."""

    prompt: str
    seed: int
    num_inference_steps: int
    guidance_scale: float | None = None

    def options(self) -> Options:
        """The fields that `darkroom.Client.generate` takes beside the prompt."""
        return {
            "seed": self.seed,
            "num_inference_steps": self.num_inference_steps,
            "guidance_scale": self.guidance_scale,
        }


def make_requests(
    count: int,
    *,
    seed: int,
    steps: tuple[int, int],
    guidance_scales: Sequence[float | None] = (None,),
) -> list[Request]:
    """Requests of `steps` from low to high, both included, with guidance scales in turn.

    The step counts are spread evenly over the range, then shuffled: every count of requests gets
    short and long ones.
    """
    chance = random.Random(seed)
    low, high = steps
    spread = [low + round((high - low) * n / max(count - 1, 1)) for n in range(count)]
    chance.shuffle(spread)
    return [
        Request(
            prompt=_prompt(chance),
            seed=chance.randrange(2**32),
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scales[n % len(guidance_scales)],
        )
        for n, num_inference_steps in enumerate(spread)
    ]


def poisson_arrivals(per_s: float, seconds: float, *, seed: int) -> list[float]:
    """When independent users ask, in seconds from the start: `per_s` of them at a mean."""
    chance = random.Random(seed)
    arrivals: list[float] = []
    now = chance.expovariate(per_s)
    while now < seconds:
        arrivals.append(now)
        now += chance.expovariate(per_s)
    return arrivals


def perf_analyzer_input(requests: Sequence[Request]) -> dict[str, Any]:
    """The content of the file that perf_analyzer's --input-data takes."""
    return {"data": [_tensors(request) for request in requests]}


def _tensors(request: Request) -> dict[str, Any]:
    fields = {"prompt": request.prompt, **request.options()}
    return {
        name: {"content": [value], "shape": [1]}
        for name, value in fields.items()
        if value is not None
    }


def _prompt(chance: random.Random) -> str:
    colour, background = chance.sample(_COLOURS, 2)
    size, shape = chance.choice(_SIZES), chance.choice(_SHAPES)
    return f"a {size} {colour} {shape} on a {background} background"
