"""What hardware a checkpoint needs: memory, rows that fit into it, and how long steps take.

Everything is computed, from the networks' shapes and from the datasheets of GPUs. docs/hardware.md
has the formulas, and says what of it was measured.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from darkroom_export.errors import ExportError
from darkroom_export.families import SizeLimits, size_limits, vae_scale_factor
from darkroom_export.networks import MAX_BATCH_SIZE, InputShape, NetworkSpec, network_specs
from darkroom_export.plan_checkpoint import META, Skeleton, load_skeleton
from darkroom_export.plan_count import Cost, count_call
from darkroom_export.plan_gpus import Gpu
from darkroom_export.precision import Precision

CONTEXT_BYTES = 2**30
"""What a process takes of a GPU before it computes: the CUDA context and the libraries' kernels."""
ALLOWANCE = 1.3
"""By how much activations are multiplied, for kernels' workspaces and the allocator's gaps."""
MEMORY_SHARE = 0.9
"""Of the memory that a GPU is sold with, what a program gets."""
GUIDED_ROWS = 2
"""Rows of a picture with classifier-free guidance."""
USUAL_ROWS = 16
"""The engine's `max_rows` if nobody says otherwise: more make every step longer for everybody."""
TILE_SIZES = (1536, 1024, 768, 512)
"""Pixels; the first is the engine's `vae_tile_size` if nobody says otherwise."""
TILE_OVERLAP = 128
"""Pixels; the engine's `vae_tile_overlap`."""
VAE = ("vae_decoder", "vae_encoder")
MAX_NUM_INFERENCE_STEPS = 150

PROFILES = ("full", "balanced", "low")
NUM_CONTEXTS = {"full": 1, "balanced": 3, "low": 1}
"""Processes with networks in them; unless all stay, PyTorch's have one each."""
_WAYS = (
    *(("full", TILE_SIZES[0]), ("balanced", TILE_SIZES[0])),
    *(("full", tile) for tile in TILE_SIZES[1:]),
    *(("balanced", tile) for tile in TILE_SIZES[1:]),
    *(("low", tile) for tile in TILE_SIZES),
)
"""Memory profiles and tiles, what costs least first: tiles change the picture a little."""


@dataclass(frozen=True)
class NetworkPlan:
    """A network of the checkpoint, and what it costs."""

    name: str
    precision: Precision
    """What it computes in where the plan's precision is asked for."""
    num_parameters: int
    weight_bytes: Mapping[Precision, int]
    """By the precision that is asked for."""
    cost: Cost
    """Of one row at the plan's size."""
    tiles: Mapping[int, Cost]
    """Of one row of a tile, by its side in pixels, where that is less than the whole picture."""

    def call(self, tile: int) -> Cost:
        return self.tiles.get(tile, self.cost)

    def activation_bytes(self, rows: int, tile: int) -> float:
        return ALLOWANCE * rows * self.call(tile).peak_bytes

    def bound_s(self, gpu: Gpu, rows: int, tile: int, weights: int) -> float:
        """The time that no program can go below."""
        cost = self.call(tile)
        peak = gpu.peak_flops(self.precision)
        return max(rows * cost.flop / peak, weights / gpu.bandwidth)

    def expected_s(self, gpu: Gpu, rows: int, tile: int, weights: int) -> float:
        """The time at the share of the peak rate that others reached, or to move all there is."""
        cost = self.call(tile)
        peak = gpu.peak_flops(self.precision) * gpu.efficiency.share
        moved = weights + rows * max(0, cost.moved_bytes - weights)
        return max(rows * cost.flop / peak, moved / gpu.bandwidth)


@dataclass(frozen=True)
class GpuPlan:
    """How a checkpoint runs on one GPU; where it does not, there is only the reason."""

    gpu: Gpu
    usable_bytes: int
    refusal: str | None = None
    """Why it cannot be used."""
    memory_profile: str = PROFILES[0]
    vae_tile_size: int = TILE_SIZES[0]
    most_rows: int = 0
    """That fit into memory."""
    rows: int = 0
    """That the times are of."""
    memory_bytes: int = 0
    step_bound_s: float = 0.0
    step_s: float = 0.0
    """Of a call with `rows` rows."""
    picture_s: float = 0.0
    """Of one guided picture alone: its prompts, all its steps, and its decoding."""
    pictures_per_s: float = 0.0
    """With all rows taken by guided pictures."""

    @property
    def is_tiled(self) -> bool:
        """Whether the VAE's tiles must be smaller than the engine's own setting."""
        return self.vae_tile_size < TILE_SIZES[0]


@dataclass(frozen=True)
class Plan:
    """A checkpoint at one size, precision and number of steps."""

    source: str
    family: str
    width: int
    height: int
    default_size: int
    """The side of the checkpoint's own pictures."""
    precision: Precision
    num_inference_steps: int
    denoiser: str
    networks: Mapping[str, NetworkPlan]

    @cached_property
    def weight_bytes(self) -> int:
        return sum(map(self._weights, self.networks))

    def memory_bytes(self, profile: str, rows: int, tile: int) -> float:
        """What a GPU must have free for calls of so many rows."""
        held = {
            name: self._weights(name)
            + network.activation_bytes(rows if name == self.denoiser else 1, tile)
            for name, network in self.networks.items()
        }
        stays = {
            "full": set(held),
            "balanced": {self.denoiser, VAE[0]},
            "low": set[str](),
        }[profile]
        passing = max((held[name] for name in held.keys() - stays), default=0.0)
        contexts = NUM_CONTEXTS[profile] * CONTEXT_BYTES
        return sum(held[name] for name in stays) + passing + contexts

    def most_rows(self, usable_bytes: int, profile: str, tile: int) -> int:
        """The most rows of a call that fit, 0 if none do."""
        counts = range(1, MAX_BATCH_SIZE + 1)
        fitting = (n for n in counts if self.memory_bytes(profile, n, tile) <= usable_bytes)
        return max(fitting, default=0)

    def max_rows(self, rows: int) -> int:
        """The engine's setting for it: rows at the checkpoint's own size, fewer of larger ones."""
        own, asked = self.default_size**2, self.width * self.height
        # Rounded up: the engine rounds down what is left of it at the larger size.
        scaled = -(-rows * max(own, asked) // own)
        return max(GUIDED_ROWS, min(MAX_BATCH_SIZE, scaled))

    def on(self, gpu: Gpu, rows: int | None = None) -> GpuPlan:
        """The plan for one GPU.

        Args:
            rows: of a call, which must fit; None takes the engine's usual number, or what fits.
        """
        usable = int(MEMORY_SHARE * gpu.memory_gib * 2**30)
        if self.precision is Precision.BF16 and not gpu.has_bf16:
            return GpuPlan(gpu, usable, "it has no bf16")
        needed = rows or GUIDED_ROWS
        for profile, tile in _WAYS:
            if tile != TILE_SIZES[0] and tile >= max(self.width, self.height):
                continue
            most = self.most_rows(usable, profile, tile)
            if most >= needed:
                return self._timed(gpu, usable, (profile, tile), most, rows)
        least = min(self.memory_bytes(profile, needed, tile) for profile, tile in _WAYS)
        return GpuPlan(
            gpu,
            usable,
            f"{needed} rows need {least / 1e9:.1f} GB at least, it has {usable / 1e9:.1f} GB",
        )

    def _timed(
        self, gpu: Gpu, usable: int, way: tuple[str, int], most: int, rows: int | None
    ) -> GpuPlan:
        profile, tile = way
        planned = rows or min(most, USUAL_ROWS)
        step = self._expected_s(self.denoiser, gpu, planned, tile)
        prompts = sum(
            # The prompt and the negative one.
            2 * self._expected_s(name, gpu, 1, tile)
            for name in self.networks
            if name not in (self.denoiser, *VAE)
        )
        decode = self._num_tiles(tile) * self._expected_s(VAE[0], gpu, 1, tile)
        pictures = max(1, planned // GUIDED_ROWS)
        around = prompts + decode
        # A single row is half a guided picture: it takes twice as many calls.
        calls = self.num_inference_steps * (1 if planned >= GUIDED_ROWS else GUIDED_ROWS)
        alone = self._expected_s(self.denoiser, gpu, GUIDED_ROWS, tile)
        network = self.networks[self.denoiser]
        return GpuPlan(
            gpu,
            usable,
            memory_profile=profile,
            vae_tile_size=tile,
            most_rows=most,
            rows=planned,
            memory_bytes=int(self.memory_bytes(profile, planned, tile)),
            step_bound_s=network.bound_s(gpu, planned, tile, self._weights(self.denoiser)),
            step_s=step,
            picture_s=self.num_inference_steps * alone + around,
            pictures_per_s=pictures / (calls * step + pictures * around),
        )

    def _weights(self, name: str) -> int:
        return self.networks[name].weight_bytes[self.precision]

    def _expected_s(self, name: str, gpu: Gpu, rows: int, tile: int) -> float:
        return self.networks[name].expected_s(gpu, rows, tile, self._weights(name))

    def _num_tiles(self, tile: int) -> int:
        """As the engine cuts them, see its tiling.py."""
        if max(self.width, self.height) <= tile:
            return 1
        strips = [
            1 if side <= tile else -(-(side - TILE_OVERLAP) // (tile - TILE_OVERLAP))
            for side in (self.width, self.height)
        ]
        return strips[0] * strips[1]


def make_plan(
    source: str,
    *,
    width: int | None = None,
    height: int | None = None,
    precision: Precision = Precision.FP16,
    num_inference_steps: int | None = None,
    is_fused: bool = True,
) -> Plan:
    """Count what the networks of a checkpoint cost, of which only the configs are read.

    Args:
        source: a diffusers folder, or the name of an architecture.
        width, height: of a picture, in pixels; by default the checkpoint's own size.
        num_inference_steps: of a picture; by default what the family's pictures have.
        is_fused: attention is one kernel that does not store the scores of queries and keys.

    Raises:
        ExportError: names what is wrong, and what is allowed.
    """
    skeleton = load_skeleton(source)
    pipeline, family = skeleton.pipeline, skeleton.family
    scale = vae_scale_factor(pipeline)
    sizes = size_limits(pipeline, family)
    width = _side("width", width, sizes)
    height = _side("height", height, sizes)
    steps = family.num_inference_steps if num_inference_steps is None else num_inference_steps
    if not 1 <= steps <= MAX_NUM_INFERENCE_STEPS:
        raise ExportError(f"steps: {steps} is not between 1 and {MAX_NUM_INFERENCE_STEPS}")
    shape = InputShape(1, height // scale, width // scale, 77 + family.t5_length)
    networks = [
        _network_plan(spec, skeleton, shape, precision, is_fused=is_fused)
        for spec in network_specs(pipeline, family)
    ]
    return Plan(
        source=source,
        family=skeleton.family_name,
        width=width,
        height=height,
        default_size=sizes.default,
        precision=precision,
        num_inference_steps=steps,
        denoiser=family.denoiser,
        networks={network.name: network for network in networks},
    )


def plan_gpus(plan: Plan, gpus: Sequence[Gpu], rows: int | None = None) -> list[GpuPlan]:
    """The plan for each GPU.

    Raises:
        ExportError: rows is out of range.
    """
    if rows is not None and not 1 <= rows <= MAX_BATCH_SIZE:
        raise ExportError(f"rows: {rows} is not between 1 and {MAX_BATCH_SIZE}")
    return [plan.on(gpu, rows) for gpu in gpus]


def _network_plan(
    spec: NetworkSpec,
    skeleton: Skeleton,
    shape: InputShape,
    precision: Precision,
    *,
    is_fused: bool,
) -> NetworkPlan:
    weight_bytes = {each: _weight_bytes(spec, each) for each in Precision}
    spec.cast(precision)
    scale = vae_scale_factor(skeleton.pipeline)
    tiles = {
        tile: count_call(spec, _cut(shape, tile // scale), META, is_fused=is_fused)
        for tile in TILE_SIZES
        if spec.name in VAE and tile < scale * max(shape.height, shape.width)
    }
    return NetworkPlan(
        name=spec.name,
        precision=spec.precision(precision),
        num_parameters=sum(tensor.numel() for tensor in spec.module.parameters()),
        weight_bytes=weight_bytes,
        cost=count_call(spec, shape, META, is_fused=is_fused),
        tiles=tiles,
    )


def _weight_bytes(spec: NetworkSpec, precision: Precision) -> int:
    spec.cast(precision)
    tensors = (*spec.module.parameters(), *spec.module.buffers())
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _cut(shape: InputShape, side: int) -> InputShape:
    return shape._replace(height=min(shape.height, side), width=min(shape.width, side))


def _side(name: str, size: int | None, limits: SizeLimits) -> int:
    if size is None:
        return limits.default
    if size % limits.multiple or not limits.min <= size <= limits.max:
        raise ExportError(
            f"{name}: {size} is not a multiple of {limits.multiple} between {limits.min} and "
            f"{limits.max}"
        )
    return size
