"""Optimisation profiles: for which shapes of its inputs an engine is built.

People think in rows of a call, pixels, and lengths of prompts. What each network's inputs then
measure follows from the dynamic dimensions of its ONNX graph.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import product
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError

from darkroom_export.errors import ExportError, first_line
from darkroom_export.networks import MAX_BATCH_SIZE

Shape = tuple[int, ...]
PRESETS = ("native", "buckets", "dynamic", "max-batch")
MAX_PROMPT_MULTIPLES = 3
"""Of the preset for all sizes: prompts of 1, 2 and 3 chunks together are repeated to 6."""
VAE_DECODER, VAE_ENCODER = "vae_decoder", "vae_encoder"
_ROWS_AT_512 = 32
_BUCKETS = (2, 4, 8, 16, 32)
_DIMENSION = re.compile(r"(?:(\d+)\*)?([A-Za-z_]\w*)")


@dataclass(frozen=True)
class Span:
    """The smallest, the usual and the largest value of something; engines are fastest at `opt`."""

    min: int
    opt: int
    max: int

    @classmethod
    def parse(cls, field: str, text: str) -> "Span":
        """Read `MIN:OPT:MAX`, or one number for all three.

        Raises:
            ExportError: it is neither, or not in order.
        """
        parts = text.split(":")
        if len(parts) not in (1, 3) or not all(part.isdecimal() for part in parts):
            raise ExportError(f"{field}: {text!r} is neither a number nor MIN:OPT:MAX")
        span = cls(*(int(part) for part in (parts if len(parts) == 3 else parts * 3)))
        if not span.min <= span.opt <= span.max:
            raise ExportError(f"{field}: {text!r} is not in order, allowed is MIN <= OPT <= MAX")
        return span

    @classmethod
    def of(cls, value: int) -> "Span":
        return cls(value, value, value)

    def __str__(self) -> str:
        return f"{self.min}:{self.opt}:{self.max}"

    def holds(self, other: "Span") -> bool:
        return self.min <= other.min and other.max <= self.max

    def map(self, change: Callable[[int], int]) -> "Span":
        return Span(change(self.min), change(self.opt), change(self.max))


@dataclass(frozen=True)
class Calls:
    """The calls of the denoiser that one profile is for."""

    batch: Span
    """Rows: a picture with guidance takes two."""
    height: Span
    width: Span
    """Pixels."""

    def holds_sizes_of(self, other: "Calls") -> bool:
        return self.height.holds(other.height) and self.width.holds(other.width)


@dataclass(frozen=True)
class Wishes:
    """What a user says about profiles, as text; None is what the preset has."""

    preset: str = PRESETS[0]
    profiles: Sequence[str] = ()
    """In place of the preset's: `batch=1:8:8,height=512,width=512`."""
    batch: str | None = None
    height: str | None = None
    width: str | None = None
    """In place of every profile's."""
    prompt_multiples: str | None = None
    pictures: str | None = None


@dataclass(frozen=True)
class Plan:
    """For which calls the engines of a repository are built."""

    profiles: tuple[Calls, ...]
    prompt_multiples: Span
    """Chunks of the text encoder's length that a prompt takes."""
    pictures: Span
    """Of one call of the VAE's decoder."""

    @property
    def max_rows(self) -> int:
        """Up to how many rows any call may have, whatever its size: 0 if one row is too few."""
        return min(self._max_rows_of(calls) for calls in self.profiles)

    def _max_rows_of(self, calls: Calls) -> int:
        batches = [other.batch for other in self.profiles if other.holds_sizes_of(calls)]
        rows = 0
        for batch in sorted(batches, key=lambda span: span.min):
            if batch.min <= rows + 1:
                rows = max(rows, batch.max)
        return rows

    def limits(self, limits: Mapping[str, Any]) -> dict[str, Any]:
        """The manifest's limits, narrowed to what these engines can do."""
        spans = [span for calls in self.profiles for span in (calls.height, calls.width)]
        narrowed = {
            **limits,
            "min_size": min(span.min for span in spans),
            "max_size": max(span.max for span in spans),
            "max_embeddings_multiples": self.prompt_multiples.max,
        }
        native = Calls(
            Span.of(1), Span.of(limits["default_height"]), Span.of(limits["default_width"])
        )
        if not any(calls.holds_sizes_of(native) for calls in self.profiles):
            first = self.profiles[0]
            narrowed |= {"default_height": first.height.opt, "default_width": first.width.opt}
        sizes = {
            ((calls.height.min, calls.height.max), (calls.width.min, calls.width.max))
            for calls in self.profiles
        }
        whole = (narrowed["min_size"], narrowed["max_size"])
        if (whole, whole) not in sizes:
            # Not every pair of sides between the smallest and the largest.
            narrowed["sizes"] = [[list(height), list(width)] for height, width in sorted(sizes)]
        return narrowed


def make_plan(wishes: Wishes, limits: Mapping[str, Any]) -> Plan:
    """What the wishes come to for a checkpoint of the given limits.

    Raises:
        ExportError: names the field, its value and what is allowed.
    """
    if wishes.preset not in PRESETS:
        raise ExportError(f"preset: {wishes.preset!r} is none, there are {', '.join(PRESETS)}")
    multiples = limits["max_embeddings_multiples"]
    profiles = _preset(wishes.preset, limits)
    if wishes.profiles:
        profiles = [_read_calls(text, profiles[0]) for text in wishes.profiles]
    own = {
        name: Span.parse(name, text)
        for name, text in (
            ("batch", wishes.batch),
            ("height", wishes.height),
            ("width", wishes.width),
        )
        if text is not None
    }
    profiles = [Calls(**{**vars(calls), **own}) for calls in profiles]
    default = min(MAX_PROMPT_MULTIPLES, multiples) if wishes.preset == "dynamic" else 1
    plan = Plan(
        tuple(profiles),
        Span.parse("prompt-multiples", wishes.prompt_multiples or f"1:1:{default}"),
        Span.parse("pictures", wishes.pictures or "1"),
    )
    _check(plan, limits)
    return plan


def _preset(preset: str, limits: Mapping[str, Any]) -> list[Calls]:
    height, width = Span.of(limits["default_height"]), Span.of(limits["default_width"])
    rows = _rows_for(height.max * width.max)
    if preset == "buckets":
        most = [bucket for bucket in _BUCKETS if bucket <= rows]
        least = [1, *(bucket + 1 for bucket in most)]
        return [
            Calls(Span(low, high, high), height, width)
            for low, high in zip(least, most, strict=False)
        ]
    if preset == "max-batch":
        return [Calls(Span(1, MAX_BATCH_SIZE, MAX_BATCH_SIZE), height, width)]
    if preset == "dynamic":
        smallest, largest = limits["min_size"], limits["max_size"]
        rows = _rows_for(largest * largest)
        height, width = (Span(smallest, side.opt, largest) for side in (height, width))
    return [Calls(Span(1, max(2, rows // 4), rows), height, width)]


def _rows_for(pixels: int) -> int:
    """As many as make about 32 pictures of 512 pixels a side, a power of 2, one guided at least."""
    return int(2 ** max(1, min(5, math.floor(math.log2(_ROWS_AT_512 * 512**2 / pixels)))))


def _read_calls(text: str, default: Calls) -> Calls:
    """Read `batch=1:8:8,height=512,width=512`; what is left out is the preset's."""
    names = [field.name for field in fields(Calls)]
    given = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        if name not in names or name in given:
            raise ExportError(
                f"profile: {part!r} in {text!r} is not one of {', '.join(names)} and =MIN:OPT:MAX, "
                "each once"
            )
        given[name] = Span.parse(f"profile: {name}", value)
    return Calls(**{**vars(default), **given})


def _check(plan: Plan, limits: Mapping[str, Any]) -> None:
    for number, calls in enumerate(plan.profiles, start=1):
        where = f"profile {number}: " if len(plan.profiles) > 1 else ""
        _check_span(f"{where}batch", calls.batch, 1, MAX_BATCH_SIZE)
        for name in ("height", "width"):
            _check_span(
                f"{where}{name}",
                getattr(calls, name),
                limits["min_size"],
                limits["max_size"],
                limits["size_multiple"],
            )
    most = limits["max_embeddings_multiples"]
    _check_span("prompt-multiples", plan.prompt_multiples, 1, most)
    _check_span("pictures", plan.pictures, 1, MAX_BATCH_SIZE)
    for name, least in (
        ("prompt-multiples", plan.prompt_multiples.min),
        ("pictures", plan.pictures.min),
        ("batch", 1 if plan.max_rows else min(calls.batch.min for calls in plan.profiles)),
    ):
        if least > 1:
            raise ExportError(f"{name}: begins at {least}, but there are always calls of 1")
    if not plan.max_rows:
        raise ExportError("batch: at some sizes no profile begins at 1, but there are such calls")


def _check_span(field: str, span: Span, low: int, high: int, multiple: int = 1) -> None:
    for value in (span.min, span.opt, span.max):
        if value % multiple or not low <= value <= high:
            allowed = f"{low} to {high}"
            if multiple > 1:
                allowed = f"the multiples of {multiple} from {allowed}"
            raise ExportError(f"{field}: {value} in {span} is not allowed, but {allowed}")


@dataclass(frozen=True)
class ShapeRange:
    """What an input may measure in one profile, the batch first."""

    min: Shape
    opt: Shape
    max: Shape


@dataclass(frozen=True)
class Dimension:
    """A side of an input: so many times a named size, or, without a name, a number."""

    factor: int
    name: str | None = None


@dataclass(frozen=True)
class NetworkProfile:
    """One profile of one network's engine."""

    inputs: Mapping[str, tuple[Dimension, ...]]
    sizes: Mapping[str, Span]
    """By the names of the dynamic dimensions."""

    @property
    def shapes(self) -> dict[str, ShapeRange]:
        """Of every input, also of those without a dynamic dimension."""
        smallest, best, largest = (
            self._measure({name: getattr(span, end) for name, span in self.sizes.items()})
            for end in ("min", "opt", "max")
        )
        return {name: ShapeRange(smallest[name], best[name], largest[name]) for name in self.inputs}

    def corners(self) -> list[dict[str, Shape]]:
        """The inputs' shapes at each combination of smallest and largest sizes, and at the best."""
        ranges = [sorted({span.min, span.max}) for span in self.sizes.values()]
        points = [tuple(span.opt for span in self.sizes.values()), *product(*ranges)]
        return [
            self._measure(dict(zip(self.sizes, point, strict=True)))
            for point in dict.fromkeys(points)
        ]

    def _measure(self, sizes: Mapping[str, int]) -> dict[str, Shape]:
        return {
            name: tuple(
                dimension.factor * (sizes[dimension.name] if dimension.name else 1)
                for dimension in dimensions
            )
            for name, dimensions in self.inputs.items()
        }


def read_inputs(network: str, path: Path) -> dict[str, tuple[Dimension, ...]]:
    """The inputs of an ONNX graph, whose weights are left where they are.

    Raises:
        ExportError: the file cannot be read, or has a dimension that is neither number nor name.
    """
    try:
        graph = onnx.load(path, load_external_data=False).graph
    except (OSError, DecodeError) as error:
        raise ExportError(f"{path}: {first_line(error)}") from None
    weights = {tensor.name for tensor in graph.initializer}
    return {
        tensor.name: tuple(
            _dimension(f"{network}: {tensor.name}", dimension)
            for dimension in tensor.type.tensor_type.shape.dim
        )
        for tensor in graph.input
        if tensor.name not in weights
    }


def _dimension(where: str, dimension: Any) -> Dimension:
    if not dimension.dim_param:
        return Dimension(dimension.dim_value)
    match = _DIMENSION.fullmatch(dimension.dim_param)
    if match is None:
        raise ExportError(f"{where}: the dimension {dimension.dim_param!r} is none of an export")
    return Dimension(int(match[1] or 1), match[2])


class Networks:
    """What the sizes of a plan come to in each network of a repository."""

    def __init__(self, manifest: Mapping[str, Any]) -> None:
        self._text = manifest["text"]
        self._text_encoders = {encoder["network"] for encoder in self._text["encoders"]}
        self._samplers = {
            manifest["denoiser"]["network"],
            *(record["network"] for record in manifest["controlnets"].values()),
        }
        self._originals = {
            changed: original
            for variant in manifest["variants"].values()
            for original, changed in variant.items()
        }
        self._latent = manifest["latents"]["vae_scale_factor"]
        self._grid = manifest["limits"]["size_multiple"]

    def profiles(
        self, network: str, inputs: Mapping[str, tuple[Dimension, ...]], plan: Plan
    ) -> list[NetworkProfile]:
        """The profiles of a network's engine, each of which is another.

        Raises:
            ExportError: it has a dynamic dimension that follows from nothing in the plan.
        """
        named = {
            side.name: tensor
            for tensor, sides in inputs.items()
            for side in sides
            if side.name is not None
        }
        profiles = []
        for calls in plan.profiles:
            known = self._sizes(self._originals.get(network, network), calls, plan)
            for name, tensor in named.items():
                if name not in known:
                    raise ExportError(
                        f"{network}: {tensor}: its dimension {name!r} has no size here, only "
                        f"{', '.join(known)} have"
                    )
            sizes = {name: span for name, span in known.items() if name in named}
            profile = NetworkProfile(inputs, sizes)
            if profile not in profiles:
                profiles.append(profile)
        return profiles

    def _sizes(self, network: str, calls: Calls, plan: Plan) -> dict[str, Span]:
        """The sizes of the dynamic dimensions, in the units in which each network counts them."""
        if network in self._text_encoders:
            # A call reads one prompt, a row for each of its chunks.
            return {"batch": plan.prompt_multiples}
        if network in (VAE_DECODER, VAE_ENCODER):
            batch = plan.pictures if network == VAE_DECODER else Span.of(1)
            return {"batch": batch, **self._sides(calls, self._latent)}
        if network in self._samplers:
            return {
                "batch": calls.batch,
                **self._sides(calls, self._grid),
                "sequence": self._sequence(plan.prompt_multiples),
            }
        # The safety checker, which looks at one picture after the other.
        return {"batch": Span.of(1)}

    @staticmethod
    def _sides(calls: Calls, pixels: int) -> dict[str, Span]:
        return {
            "height": calls.height.map(lambda side: side // pixels),
            "width": calls.width.map(lambda side: side // pixels),
        }

    def _sequence(self, multiples: Span) -> Span:
        """Tokens: rows whose prompts are of several lengths are all repeated to one for all."""
        lengths = [self._num_tokens(chunks) for chunks in range(1, multiples.max + 1)]
        return Span(
            self._num_tokens(multiples.min), self._num_tokens(multiples.opt), math.lcm(*lengths)
        )

    def _num_tokens(self, chunks: int) -> int:
        """Of a prompt of so many chunks, as the denoiser gets it."""
        clip, t5 = (
            max(
                (
                    encoder["tokenizer"]["max_length"]
                    for encoder in self._text["encoders"]
                    if encoder["kind"] == kind
                ),
                default=0,
            )
            for kind in ("clip", "t5")
        )
        return int(chunks * clip + t5 + self._text["num_blank_tokens"])
