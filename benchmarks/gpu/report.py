"""A result as text: a few tables of what was measured, and what was not."""

from collections.abc import Mapping
from typing import Any

from benchmarks.measurements import table


def text(result: Mapping[str, Any]) -> str:
    """Everything there is to say of a result; parts that were not run are left out."""
    blocks = [_card(result)] if "card" in result else []
    for name, parts in result["models"].items():
        for part, describe in _PARTS.items():
            if part in parts:
                blocks.append(f"{name}, {part}\n{describe(parts[part])}")
    notes = [f"note: {note}" for note in result["notes"]]
    notes += [f"FAILED {part}: {error}" for part, error in result["errors"].items()]
    return "\n\n".join([*blocks, *notes])


def _card(result: Mapping[str, Any]) -> str:
    card, gpu = result["card"], result["environment"]["gpu"]
    matmul, copy = card["matmul"], card["copy"]
    return (
        f"{gpu.get('name', 'CPU')}, torch {gpu['torch']}: {matmul['tflops']['median']:g} TFLOP/s "
        f"by a product of {matmul['size']} ({matmul['dtype']}), "
        f"{copy['gb_per_s']['median']:g} GB/s by a copy"
    )


def _accuracy(part: Mapping[str, Any]) -> str:
    rows = []
    for maker, requests in part.items():
        if not isinstance(requests, list):
            continue
        rows += [
            [
                maker,
                str(request["num_steps"]),
                "on" if request["is_guided"] else "off",
                f"{request['latents']['max_abs']:g}",
                _db(request["latents"]["psnr_db"]),
                f"{request['picture']['max_levels']:g}",
                _db(request["picture"]["psnr_db"]),
            ]
            for request in requests
        ]
    header = ["", "steps", "guidance", "latents max", "PSNR dB", "levels max", "PSNR dB"]
    return table(header, rows)


def _network(part: Mapping[str, Any]) -> str:
    rows = [
        [name, *_speed_of(entry), f"{of['decoder_ms']['median']:.2f}"]
        for name, of in part["configurations"].items()
        for entry in of["denoiser"]
    ]
    return table(["", "rows", "ms", "TFLOP/s", "of matmul", "decoder ms"], rows)


def _steps(part: Mapping[str, Any]) -> str:
    rows = [
        [
            "engine",
            *_speed_of(entry),
            f"{entry['network_ms']['median']:.3f}",
            f"{entry['overhead_ms']:.3f}",
        ]
        for entry in part["engine"]
    ]
    return table(["", "rows", "ms", "TFLOP/s", "of matmul", "network ms", "overhead ms"], rows)


def _pairs(part: Mapping[str, Any]) -> str:
    rows = []
    for what in ("picture", "latents"):
        makers = [name for name in part[what] if name != "ratio"]
        for maker in makers:
            s = part[what][maker]["s"]
            rows.append([f"{what}, {maker}", f"{s['median']:.4f}", f"{s['min']:.4f}"])
        rows.append([f"{what}, ratio", f"{part[what]['ratio']['median']:.3f}", ""])
    lines = table(["", "s", "least"], rows)
    if "batch" in part:
        batch = part["batch"]
        lines += f"\na batch of {batch['pictures']}: {batch['pictures_per_s']['median']:g}/s"
    return lines


def _saturated(part: Mapping[str, Any]) -> str:
    rows = [
        [
            what,
            f"{part[what]['pictures_per_s']}",
            f"{part[what]['mean_rows']:.1f}",
            f"{part[what]['step_ms']['median']:.2f}",
            f"{part[what]['tflops']:g}",
            f"{part[what]['share_of_matmul']}",
        ]
        for what in ("equal", "mixed")
    ]
    peer = part["diffusers eager"]
    rows.append(
        [f"diffusers, {peer['pictures']}", f"{peer['pictures_per_s']['median']}", *[""] * 4]
    )
    return table(["", "pictures/s", "rows", "step ms", "TFLOP/s", "of matmul"], rows)


def _join(part: Mapping[str, Any]) -> str:
    return (
        f"{part['num_joins']} joins: {part['queue_ms']['median']:g} ms, "
        f"{part['delay_steps']['median']:g} steps of {part['step_ms']['median']:g} ms "
        f"(at the most {part['delay_steps']['max']:g})"
    )


def _load(part: Mapping[str, Any]) -> str:
    rows = [
        [
            f"{load['share']:g}, {policy}",
            str(of["num_requests"]),
            str(of["num_unfinished"]),
            *(f"{of['latency_s'][rank]:.3f}" for rank in ("p50", "p95", "p99")),
            f"{of['share_in_time']:.3f}",
            f"{of['goodput_per_s']:.3f}",
        ]
        for load in part["loads"]
        for policy, of in load["policies"].items()
    ]
    header = ["load", "requests", "unfinished", "p50 s", "p95 s", "p99 s", "in time", "goodput/s"]
    return f"capacity {part['capacity_per_s']:g}/s\n{table(header, rows)}"


def _server(part: Mapping[str, Any]) -> str:
    if "skipped" in part:
        return f"not measured: {part['skipped']}"
    rows = [
        [way, num_rows, f"{of['step_ms']:.3f}", f"{of['more_ms']:.3f}", f"{of['ratio']:.3f}"]
        for way, by_rows in part["ways"].items()
        for num_rows, of in by_rows.items()
    ]
    return table(["", "rows", "step ms", "more ms", "ratio"], rows)


def _speed_of(entry: Mapping[str, Any]) -> list[str]:
    share = entry["share_of_matmul"]
    return [
        str(entry["rows"]),
        f"{entry['ms']['median']:.3f}",
        f"{entry['tflops']:g}",
        "" if share is None else f"{100 * share:.1f} %",
    ]


def _db(psnr: float | None) -> str:
    return "equal" if psnr is None else f"{psnr:g}"


_PARTS = {
    "check": _accuracy,
    "network": _network,
    "steps": _steps,
    "solo": _pairs,
    "saturated": _saturated,
    "exact": _accuracy,
    "join": _join,
    "load": _load,
    "compiled": _pairs,
    "server": _server,
}
