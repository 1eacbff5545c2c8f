"""A plan for people, for documents and for programs."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from darkroom_export.plan import (
    CONTEXT_BYTES,
    GUIDED_ROWS,
    NUM_CONTEXTS,
    PROFILES,
    VAE,
    GpuPlan,
    NetworkPlan,
    Plan,
)
from darkroom_export.precision import Precision

_NETWORKS = (
    *("network", "computes in", "parameters", "weights in fp32", "in fp16"),
    *("TFLOP a row", "activations a row"),
)
_GPUS = (
    *("GPU", "memory profile", "VAE tiles", "rows that fit", "rows", "takes"),
    *("step, at least", "step, expected", "picture", "pictures a second"),
)
_NOTE = """\
FLOP = 2 MAC. Computed, and measured on no GPU: `at least` is at the datasheet's peak rate, and
`expected` at the share of it that TensorRT was published to reach in SDXL, on this chip or, where
there is a *, on an A10. docs/hardware.md has the formulas."""


def plan_text(plan: Plan, gpus: Sequence[GpuPlan]) -> str:
    """Tables, and for a single GPU the commands to use it with."""
    parts = [
        _title(plan),
        _aligned([_NETWORKS, *_network_rows(plan)]),
        _aligned([_GPUS, *map(_gpu_row, gpus)]),
        _NOTE,
    ]
    if len(gpus) == 1 and gpus[0].refusal is None:
        parts += [_memory(plan, gpus[0]), commands(plan, gpus[0])]
    return "\n\n".join(parts)


def plan_markdown(plan: Plan, gpus: Sequence[GpuPlan]) -> str:
    """The two tables."""
    tables = ((_NETWORKS, _network_rows(plan)), (_GPUS, map(_gpu_row, gpus)))
    return "\n\n".join([_title(plan), *(_markdown(head, rows) for head, rows in tables)])


def plan_record(plan: Plan, gpus: Sequence[GpuPlan]) -> dict[str, Any]:
    """All of it, as JSON has it: bytes, seconds and FLOP."""
    return {
        "checkpoint": plan.source,
        "family": plan.family,
        "width": plan.width,
        "height": plan.height,
        "precision": str(plan.precision),
        "num_inference_steps": plan.num_inference_steps,
        "weight_bytes": plan.weight_bytes,
        "networks": {name: asdict(network) for name, network in plan.networks.items()},
        "gpus": {it.gpu.name: _gpu_record(plan, it) for it in gpus},
    }


def commands(plan: Plan, it: GpuPlan) -> str:
    """What to type: for PyTorch, which needs nothing else, and for TensorRT, in its container."""
    export = f"darkroom export {plan.source} REPOSITORY --precision {plan.precision}"
    serve = "darkroom serve REPOSITORY --max-rows"
    saving = "" if it.memory_profile == PROFILES[0] else f" --memory-profile {it.memory_profile}"
    # Only models of Triton's can be unloaded.
    outside = f" --networks triton{saving}" if saving else ""
    lines = [
        "With PyTorch:",
        f"  {export} --backend torch --device cuda",
        f"  {serve} {plan.max_rows(it.rows)}{outside}",
    ]
    if plan.precision is not Precision.BF16:
        sides = f" --height {plan.height} --width {plan.width}" if _is_resized(plan) else ""
        best = max(1, min(GUIDED_ROWS, it.rows), it.rows // 4)
        lines += [
            "With TensorRT, in NVIDIA's container (docs/tensorrt.md):",
            f"  {export}",
            f"  darkroom build REPOSITORY --backend tensorrt --batch 1:{best}:{it.rows}{sides}",
            # Its size is the repository's own from here on.
            f"  {serve} {max(GUIDED_ROWS, it.rows)}{saving}",
        ]
    if it.is_tiled:
        setting = f'key: "vae_tile_size" value {{ string_value: "{it.vae_tile_size}" }}'
        lines += [
            "In the repository's stable_diffusion/config.pbtxt, before it is served:",
            f"  parameters {{ {setting} }}",
        ]
    return "\n".join(lines)


def _title(plan: Plan) -> str:
    return (
        f"{plan.source} ({plan.family}): {plan.width} x {plan.height} pixels, {plan.precision}, "
        f"{plan.num_inference_steps} steps"
    )


def _is_resized(plan: Plan) -> bool:
    return (plan.width, plan.height) != (plan.default_size, plan.default_size)


def _network_rows(plan: Plan) -> Iterable[tuple[str, ...]]:
    networks = list(plan.networks.values())
    yield from map(_network_row, networks)
    total = sum(network.num_parameters for network in networks)
    weights = (
        sum(network.weight_bytes[precision] for network in networks)
        for precision in (Precision.FP32, Precision.FP16)
    )
    yield ("all", "", f"{total / 1e6:.1f} M", *map(_gigabytes, weights), "", "")


def _network_row(network: NetworkPlan) -> tuple[str, ...]:
    return (
        network.name,
        str(network.precision),
        f"{network.num_parameters / 1e6:.1f} M",
        _gigabytes(network.weight_bytes[Precision.FP32]),
        _gigabytes(network.weight_bytes[Precision.FP16]),
        f"{network.cost.flop / 1e12:.3f}",
        _gigabytes(network.cost.peak_bytes),
    )


def _gpu_row(it: GpuPlan) -> tuple[str, ...]:
    mark = "" if it.gpu.efficiency.is_measured else "*"
    name = f"{it.gpu.name}{mark}"
    if it.refusal is not None:
        return (name, it.refusal, *[""] * (len(_GPUS) - 2))
    return (
        name,
        it.memory_profile,
        f"{it.vae_tile_size} px" if it.is_tiled else "usual",
        str(it.most_rows),
        str(it.rows),
        f"{it.memory_bytes / 1e9:.1f} of {it.usable_bytes / 1e9:.1f} GB",
        f"{1e3 * it.step_bound_s:.1f} ms",
        f"{1e3 * it.step_s:.1f} ms",
        f"{it.picture_s:.2f} s",
        f"{it.pictures_per_s:.2f}",
    )


def _gpu_record(plan: Plan, it: GpuPlan) -> dict[str, Any]:
    record = asdict(it)
    if it.refusal is None:
        record["max_rows"] = plan.max_rows(it.rows)
        record["commands"] = commands(plan, it).splitlines()
    return record


def _memory(plan: Plan, it: GpuPlan) -> str:
    rows = {name: it.rows if name == plan.denoiser else 1 for name in plan.networks}
    lines = [("memory", "weights", "activations", "of")]
    for name, network in plan.networks.items():
        of = f"{rows[name]} rows" if name == plan.denoiser else "1 row"
        if name in VAE and it.is_tiled:
            of = f"a tile of {it.vae_tile_size} px"
        weights = network.weight_bytes[plan.precision]
        held = network.activation_bytes(rows[name], it.vae_tile_size)
        lines.append((name, _gigabytes(weights), _gigabytes(held), of))
    contexts = NUM_CONTEXTS[it.memory_profile]
    lines.append(
        (
            "CUDA",
            "",
            _gigabytes(contexts * CONTEXT_BYTES),
            f"{contexts} process{'es' * (contexts > 1)}",
        )
    )
    stay = {
        "full": "All of it at once.",
        "balanced": f"{plan.denoiser} and {VAE[0]} at once, and the largest of the others. To load "
        "the others is not in the times.",
        "low": "The largest of them alone. To load the others is not in the times.",
    }[it.memory_profile]
    return f"{_aligned(lines)}\n{stay}"


def _gigabytes(number: float) -> str:
    return f"{number / 1e9:.2f} GB"


def _aligned(rows: Iterable[Sequence[str]]) -> str:
    rows = list(rows)
    # A reason in place of figures is as long as it is.
    widths = [
        max(len(row[column]) for row in rows if any(row[2:])) for column in range(len(rows[0]))
    ]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def _markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
