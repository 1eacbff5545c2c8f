"""What a plan counts, what follows for a GPU, and how it compares with what was measured."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from darkroom.cli import main, make_parser
from darkroom_engine.config import EngineConfig
from darkroom_engine.tiling import strips
from darkroom_export import ExportError, Precision
from darkroom_export.networks import InputShape, NetworkSpec, network_specs
from darkroom_export.plan import (
    ALLOWANCE,
    TILE_OVERLAP,
    TILE_SIZES,
    USUAL_ROWS,
    Plan,
    make_plan,
    plan_gpus,
)
from darkroom_export.plan_checkpoint import META, load_skeleton
from darkroom_export.plan_count import count_call
from darkroom_export.plan_gpus import GPUS, PUBLISHED_TIMES, find_gpu
from darkroom_export.plan_text import commands, plan_markdown, plan_record, plan_text
from darkroom_export.random_checkpoint import ARCHITECTURES, make_part

PROJECT = Path(__file__).parents[2]
HARDWARE = PROJECT / "docs" / "hardware.md"
RESULTS = PROJECT / "benchmarks" / "results"


@cache
def planned(checkpoint: str, **options: Any) -> Plan:
    """A plan that is made once: the large ones take seconds."""
    return make_plan(checkpoint, **options)


@pytest.fixture
def sd15() -> Plan:
    return planned("sd15")


@pytest.fixture
def sdxl() -> Plan:
    return planned("sdxl")


# What is counted


@pytest.mark.parametrize(
    ("checkpoint", "network", "parameters", "gmac"),
    [
        ("sd15", "unet", 859.5e6, 401.6),
        ("sd15", "vae_decoder", 49.5e6, 1257.0),
        ("sd15", "text_encoder", 123.1e6, 6.65),
        ("sdxl", "unet", 2567.5e6, 3380.6),
        ("sdxl", "vae_decoder", 49.5e6, 5235.0),
        ("sdxl", "text_encoder_2", 694.7e6, 48.9),
    ],
)
def test_counts_are_the_published_ones(
    checkpoint: str, network: str, parameters: float, gmac: float
) -> None:
    counted = planned(checkpoint).networks[network]

    assert counted.num_parameters == pytest.approx(parameters, rel=1e-3)
    assert counted.cost.flop == pytest.approx(2 * gmac * 1e9, rel=1e-3)


@pytest.fixture(scope="module")
def unet() -> NetworkSpec:
    """In float32, with shapes only."""
    return network("tiny-sd15", "unet")


def network(architecture: str, name: str) -> NetworkSpec:
    skeleton = load_skeleton(architecture)
    specs = network_specs(skeleton.pipeline, skeleton.family)
    return next(spec for spec in specs if spec.name == name)


def test_rows_multiply_the_cost(unet: NetworkSpec) -> None:
    one, four = (count_call(unet, InputShape(rows, 32, 32), META) for rows in (1, 4))
    weights = sum(tensor.nbytes for tensor in unet.module.parameters())

    assert four.flop == 4 * one.flop
    assert four.peak_bytes == pytest.approx(4 * one.peak_bytes, rel=0.01)
    assert four.moved_bytes - weights == pytest.approx(4 * (one.moved_bytes - weights), rel=0.01)


def test_attention_is_counted_however_it_is_computed(unet: NetworkSpec) -> None:
    shape = InputShape(1, 32, 32)
    fused = count_call(unet, shape, META)
    unfused = count_call(unet, shape, META, is_fused=False)
    # Queries, keys and values of 1024 pixels, 4 heads: the scores of each with each, in float32.
    scores = 4 * 1024**2 * 4

    assert unfused.flop == fused.flop
    assert unfused.peak_bytes - fused.peak_bytes >= scores


def test_what_is_freed_does_not_count() -> None:
    class Halves(torch.nn.Module):
        def forward(self, sample: torch.Tensor) -> torch.Tensor:
            for _ in range(10):
                # A view is free; each round needs the last one's tensor, and makes one.
                sample = sample.view(-1).view(sample.shape) / 2
            return sample

    spec = replace(network("tiny-sd15", "vae_decoder"), module=Halves())
    cost = count_call(spec, InputShape(1, 8, 8), META)
    size = 4 * 8 * 8 * 4

    assert cost.flop == 0
    assert cost.peak_bytes == 2 * size
    assert cost.moved_bytes == 10 * 2 * size


@pytest.mark.parametrize(
    ("architecture", "name"),
    [
        ("tiny-sd15", "unet"),
        ("tiny-sd3", "transformer"),
        ("tiny-sd15", "vae_encoder"),
    ],
)
def test_activations_are_what_pytorch_takes(architecture: str, name: str, tmp_path: Path) -> None:
    """Measured on a CPU, whose kernels take workspaces too: those are what the allowance is for."""
    skeleton = load_skeleton(architecture)
    parts = ARCHITECTURES[architecture].parts
    real = SimpleNamespace(
        **{key: make_part(parts[key]).eval() for key in vars(skeleton.pipeline) if key in parts}
    )
    spec = next(it for it in network_specs(real, skeleton.family) if it.name == name)
    shape = InputShape(4, 32, 32, 77 + skeleton.family.t5_length)

    counted = count_call(network(architecture, name), shape, META).peak_bytes
    measured = peak_of_a_real_call(spec, shape, tmp_path / "trace.json")

    assert 0.99 * counted <= measured <= ALLOWANCE * counted


def peak_of_a_real_call(spec: NetworkSpec, shape: InputShape, trace: Path) -> int:
    """By PyTorch's own account of what it allocates and frees."""
    inputs = spec.example(torch.Generator().manual_seed(0), shape)
    with torch.no_grad():
        spec.module(*inputs)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            outputs = spec.module(*inputs)
    del outputs
    profiler.export_chrome_trace(str(trace))
    events = json.loads(trace.read_text())["traceEvents"]
    changes = [event for event in events if event["name"] == "[memory]"]
    held = peak = 0
    for change in sorted(changes, key=lambda event: event["ts"]):
        held += change["args"]["Bytes"]
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize(
    ("result", "precision", "profile"),
    [
        ("full-size-sd15-fp32", Precision.FP32, "full"),
        ("full-size-sd21-fp32", Precision.FP32, "full"),
        # The CPU computes fp16 graphs in float32, with weights that are converted when it starts.
        ("full-size-sdxl-fp16", Precision.FP32, "low"),
    ],
)
def test_servers_on_the_cpu_took_up_to_half_as_much_again(
    result: str, precision: Precision, profile: str
) -> None:
    """ONNX Runtime there stores the scores of attention, and its arenas grow by powers of two."""
    measured = json.loads((RESULTS / f"{result}.json").read_text())
    size = measured["size"]
    plan = make_plan(
        measured["architecture"], width=size, height=size, precision=precision, is_fused=False
    )
    held = [
        network.weight_bytes[precision] + (2 if name == "unet" else 1) * network.cost.peak_bytes
        for name, network in plan.networks.items()
        if name != "vae_encoder"
    ]
    counted = max(held) if profile == "low" else sum(held)
    peak = measured["stages"]["picture"]["peak_mb"] * 2**20

    assert measured["profile"] == profile
    assert counted < peak < 1.5 * counted


def test_weights_are_of_the_precision_that_each_network_computes_in(sdxl: Plan) -> None:
    unet, decoder = sdxl.networks["unet"], sdxl.networks["vae_decoder"]

    assert unet.precision is Precision.FP16
    assert unet.weight_bytes[Precision.FP16] == 2 * unet.num_parameters
    assert unet.weight_bytes[Precision.FP32] == 4 * unet.num_parameters
    # SDXL's VAE overflows in half precision.
    assert decoder.precision is Precision.FP32
    assert set(decoder.weight_bytes.values()) == {4 * decoder.num_parameters}


# Where it is read from


@pytest.mark.parametrize(
    "architecture", ["tiny-sd15", "tiny-sd21", "tiny-sdxl", "tiny-sdxl-refiner", "tiny-sd3"]
)
def test_configs_alone_are_enough(
    make_checkpoint: Callable[[str], Path], tmp_path: Path, architecture: str
) -> None:
    folder = tmp_path / "configs"
    whole = make_checkpoint(architecture)
    shutil.copytree(whole, folder, ignore=shutil.ignore_patterns("*.safetensors", "tokenizer*"))

    assert not list(folder.rglob("*.safetensors"))
    assert replace(make_plan(str(folder)), source=architecture) == make_plan(architecture)


def test_a_checkpoint_without_t5_costs_less() -> None:
    with_t5, without = make_plan("tiny-sd3"), make_plan("tiny-sd3-no-t5")

    assert with_t5.networks.keys() - without.networks.keys() == {"text_encoder_3"}
    assert without.num_inference_steps == 28


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("sd99", "sd99: neither a diffusers folder nor an architecture, of which there are sd15,"),
        ("tiny-sd15-controlnet", "is one component, not a checkpoint"),
    ],
)
def test_an_unknown_checkpoint_is_refused(source: str, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        make_plan(source)


def test_an_exported_repository_is_refused(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(ExportError, match="is an exported repository; a plan is made of the check"):
        make_plan(str(tmp_path))


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"model_index\.json: missing"):
        make_plan(str(tmp_path))


def test_a_broken_config_is_named(broken: Path, edit: Callable[..., None]) -> None:
    edit(broken / "unet" / "config.json", down_block_types=["Nothing"])
    with pytest.raises(ExportError, match=r"unet/config\.json: "):
        make_plan(str(broken))


def test_a_missing_config_is_named(broken: Path) -> None:
    (broken / "text_encoder" / "config.json").unlink()
    with pytest.raises(ExportError, match=r"text_encoder/config\.json: no such file"):
        make_plan(str(broken))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 500}, "width: 500 is not a multiple of 16 between 32 and 256"),
        ({"height": 512}, "height: 512 is not a multiple of 16 between 32 and 256"),
        ({"width": 16}, "width: 16 is not"),
        ({"num_inference_steps": 0}, "steps: 0 is not between 1 and 150"),
        ({"num_inference_steps": 151}, "steps: 151 is not between 1 and 150"),
    ],
)
def test_what_is_out_of_range_is_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(ExportError, match=message):
        make_plan("tiny-sd15", **options)


@pytest.mark.parametrize("rows", [0, 64])
def test_rows_that_no_export_has_are_refused(sd15: Plan, rows: int) -> None:
    with pytest.raises(ExportError, match=f"rows: {rows} is not between 1 and 63"):
        plan_gpus(sd15, list(GPUS.values()), rows)


# What follows for a GPU


def test_every_gpu_has_its_source() -> None:
    for name, gpu in GPUS.items():
        assert gpu.name == name
        assert gpu.source.startswith("https://")
        # Some tables print what sparse weights would give.
        assert gpu.fp8_tflops is None or 1.9 < gpu.fp8_tflops / gpu.fp16_tflops < 2.1
        assert gpu.has_bf16 is (float(gpu.compute_capability) >= 8)


@pytest.mark.parametrize(
    ("given", "name"), [("l40s", "L40S"), ("A100", "A100-40GB"), ("rtx4090", "RTX4090")]
)
def test_gpus_are_found_by_name(given: str, name: str) -> None:
    assert find_gpu(given).name == name


@pytest.mark.parametrize("name", list(PUBLISHED_TIMES))
def test_efficiencies_follow_from_published_times(sdxl: Plan, name: str) -> None:
    published, gpu = PUBLISHED_TIMES[name], GPUS[name]
    costs = {part: network.cost.flop for part, network in sdxl.networks.items()}
    flop = 2 * published.num_inference_steps * costs["unet"] + costs["vae_decoder"]
    share = flop / published.seconds / gpu.peak_flops(Precision.FP16)

    assert gpu.efficiency.share == pytest.approx(share, abs=0.005)


def published_steps() -> list[list[str]]:
    """The rows of docs/hardware.md's table of them."""
    text = HARDWARE.read_text().partition("<!-- published steps -->\n")[2]
    lines = text.partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.mark.parametrize("row", [pytest.param(it, id=" ".join(it[:3])) for it in published_steps()])
def test_published_steps_are_slower_than_the_bound_and_near_what_is_expected(
    row: list[str],
) -> None:
    checkpoint, gpu, rows, _, published, bound, expected = row
    on_gpu = planned(checkpoint).on(GPUS[gpu], int(rows))
    published_ms = float(published.removesuffix(" ms"))

    assert (bound, expected) == (
        f"{1e3 * on_gpu.step_bound_s:.1f} ms",
        f"{1e3 * on_gpu.step_s:.1f} ms",
    )
    assert 1e3 * on_gpu.step_bound_s < published_ms
    # Small calls leave a large chip half empty, which is not modelled.
    assert 0.9 < published_ms / (1e3 * on_gpu.step_s) < 1.8


@pytest.mark.parametrize("name", list(GPUS))
def test_most_rows_fit_and_one_more_does_not(sdxl: Plan, name: str) -> None:
    on_gpu = sdxl.on(GPUS[name])
    way = (on_gpu.memory_profile, on_gpu.most_rows, on_gpu.vae_tile_size)
    more = (on_gpu.memory_profile, on_gpu.most_rows + 1, on_gpu.vae_tile_size)

    assert sdxl.memory_bytes(*way) <= on_gpu.usable_bytes
    assert on_gpu.most_rows == 63 or sdxl.memory_bytes(*more) > on_gpu.usable_bytes
    assert on_gpu.rows == min(USUAL_ROWS, on_gpu.most_rows)
    assert on_gpu.memory_bytes <= on_gpu.usable_bytes
    assert on_gpu.step_bound_s < on_gpu.step_s


def test_a_small_gpu_gets_tiles_and_then_fewer_networks(sdxl: Plan) -> None:
    t4 = GPUS["T4"]
    ways = []
    for memory in (24, 16, 12, 10):
        on_gpu = sdxl.on(replace(t4, memory_gib=memory))
        assert on_gpu.refusal is None
        ways.append((on_gpu.memory_profile, on_gpu.vae_tile_size))

    assert ways == [("full", 1536), ("full", 768), ("full", 512), ("low", 1536)]
    assert sdxl.on(t4).is_tiled


def test_a_gpu_that_is_too_small_is_told_by_how_much(sdxl: Plan) -> None:
    on_gpu = sdxl.on(replace(GPUS["T4"], memory_gib=4))

    assert re.fullmatch(r"2 rows need \d+\.\d GB at least, it has 3\.9 GB", on_gpu.refusal or "")
    assert "too" not in plan_text(sdxl, [on_gpu])
    assert on_gpu.refusal in plan_text(sdxl, [on_gpu])
    assert "darkroom serve" not in plan_text(sdxl, [on_gpu])


def test_asked_rows_are_planned_or_refused(sdxl: Plan) -> None:
    a10 = GPUS["A10"]
    fitting = sdxl.on(a10, 8)

    assert (fitting.rows, fitting.refusal) == (8, None)
    assert fitting.step_s < sdxl.on(a10, 16).step_s
    assert "63 rows need" in (sdxl.on(replace(a10, memory_gib=10), 63).refusal or "")


def test_bf16_needs_a_gpu_that_has_it() -> None:
    plan = make_plan("tiny-sd15", precision=Precision.BF16)
    t4, a10 = plan_gpus(plan, [GPUS["T4"], GPUS["A10"]])

    assert (t4.refusal, a10.refusal) == ("it has no bf16", None)
    # ONNX networks have no bf16.
    assert "--backend torch" in commands(plan, a10)
    assert "TensorRT" not in commands(plan, a10)


def test_a_batch_makes_more_pictures_a_second_only_where_weights_are_the_limit(
    sd15: Plan,
) -> None:
    slow_memory = replace(GPUS["H100"], bandwidth_gb_s=100.0)
    few, many = sd15.on(slow_memory, 2), sd15.on(slow_memory, 16)

    assert many.pictures_per_s > 1.2 * few.pictures_per_s
    assert few.picture_s == many.picture_s


def test_memory_profiles_take_less_each(sdxl: Plan) -> None:
    taken = [sdxl.memory_bytes(profile, 2, 512) for profile in ("full", "low")]
    largest = max(network.weight_bytes[Precision.FP16] for network in sdxl.networks.values())

    assert all(more > less for more, less in pairwise(taken))
    assert taken[0] > sdxl.weight_bytes
    assert largest < taken[1] < sdxl.weight_bytes


def test_the_engines_own_settings_are_what_a_plan_takes_them_for() -> None:
    engine = EngineConfig()

    assert (engine.max_rows, engine.vae_tile_size, engine.vae_tile_overlap) == (
        USUAL_ROWS,
        TILE_SIZES[0],
        TILE_OVERLAP,
    )


@pytest.mark.parametrize("tile", TILE_SIZES)
@pytest.mark.parametrize(("width", "height"), [(1024, 1024), (2048, 1152), (512, 2048)])
def test_tiles_are_counted_as_the_engine_cuts_them(
    sdxl: Plan, tile: int, width: int, height: int
) -> None:
    plan = replace(sdxl, width=width, height=height)
    cut = [len(strips(side // 8, tile // 8, TILE_OVERLAP // 8)) for side in (width, height)]

    assert plan._num_tiles(tile) == cut[0] * cut[1]


def test_rows_of_larger_pictures_are_set_at_the_checkpoints_own_size(sd15: Plan) -> None:
    large = replace(sd15, width=1024, height=768)
    small = replace(sd15, width=256, height=256)

    # The engine gives pictures of three times the size a third of the rows.
    assert large.max_rows(8) == 24
    assert large.max_rows(40) == 63
    assert small.max_rows(8) == 8


# What is printed


def run(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    assert main(["plan", *options]) == 0
    return capsys.readouterr().out


def test_the_command_has_a_line_for_each_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    printed = run(capsys, "tiny-sd15")

    assert all(f"\n{name}" in printed for name in GPUS)
    assert "darkroom serve" not in printed
    assert "FLOP = 2 MAC" in printed


def test_for_one_gpu_it_has_commands_that_can_be_copied(
    capsys: pytest.CaptureFixture[str],
) -> None:
    printed = run(capsys, "tiny-sd15", "--gpu", "t4", "--width", "256")
    lines = [line.strip() for line in printed.splitlines()]

    assert [line for line in lines if line.startswith("darkroom ")] == [
        "darkroom export tiny-sd15 REPOSITORY --precision fp16 --backend torch --device cuda",
        "darkroom serve REPOSITORY --max-rows 32",
        "darkroom export tiny-sd15 REPOSITORY --precision fp16",
        "darkroom build REPOSITORY --backend tensorrt --batch 1:4:16 --height 128 --width 256",
        "darkroom serve REPOSITORY --max-rows 16",
    ]


def test_tiles_and_profiles_are_in_the_commands(sdxl: Plan) -> None:
    tiled = commands(sdxl, sdxl.on(GPUS["T4"]))
    low = commands(sdxl, sdxl.on(replace(GPUS["T4"], memory_gib=10)))

    assert '  parameters { key: "vae_tile_size" value { string_value: "768" } }' in tiled
    assert "--memory-profile" not in tiled
    assert "--max-rows 16 --networks triton --memory-profile low" in low


def test_the_commands_are_ones_that_exist(sdxl: Plan) -> None:
    parser = make_parser()
    for memory in (10, 80):
        text = commands(sdxl, sdxl.on(replace(GPUS["T4"], memory_gib=memory)))
        typed = [line.split()[1:] for line in text.splitlines() if "darkroom " in line]

        assert len(typed) == 5
        for words in typed:
            assert callable(parser.parse_args(words).run)


def test_json_has_everything(capsys: pytest.CaptureFixture[str]) -> None:
    record = json.loads(run(capsys, "tiny-sd15", "--gpu", "L40S", "--steps", "4", "--json"))
    unet = record["networks"]["unet"]

    assert record["num_inference_steps"] == 4
    assert unet["weight_bytes"]["fp16"] == 2 * unet["num_parameters"]
    assert record["gpus"]["L40S"]["max_rows"] == 16
    assert record["gpus"]["L40S"]["gpu"]["source"].startswith("https://")
    plan = make_plan("tiny-sd15", num_inference_steps=4)
    assert record == json.loads(json.dumps(plan_record(plan, [plan.on(GPUS["L40S"])])))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("tiny-sd15", "--gpu", "A1000"), "gpu: 'A1000' is not known, there are T4, L4, A10G,"),
        (("tiny-sd15", "--width", "500"), "width: 500 is not a multiple of 16"),
        (("nowhere",), "nowhere: neither a diffusers folder nor an architecture"),
    ],
)
def test_a_refusal_is_one_line(
    capsys: pytest.CaptureFixture[str], options: tuple[str, ...], message: str
) -> None:
    assert main(["plan", *options]) == 1
    error = capsys.readouterr().err

    assert error.startswith(f"darkroom: {message}")
    assert error.count("\n") == 1


def documented() -> list[tuple[list[str], str]]:
    """The commands in docs/hardware.md, each with what follows it."""
    parts = re.split(r"<!-- darkroom plan (.*) -->\n", HARDWARE.read_text())
    return [(command.split(), text) for command, text in zip(parts[1::2], parts[2::2], strict=True)]


@pytest.mark.parametrize(
    ("options", "text"), [pytest.param(*it, id=" ".join(it[0])) for it in documented()]
)
def test_the_documents_tables_are_the_commands(options: list[str], text: str) -> None:
    chosen = make_parser().parse_args(["plan", *options])
    plan = planned(chosen.checkpoint)

    assert chosen.markdown
    assert text.startswith(plan_markdown(plan, plan_gpus(plan, list(GPUS.values()))))


def test_the_document_has_every_gpu_with_its_figures_and_source() -> None:
    text = HARDWARE.read_text()
    for gpu in GPUS.values():
        figures = (
            gpu.name,
            f"{gpu.memory_gib} GB",
            f"{gpu.bandwidth_gb_s:g} GB/s",
            f"{gpu.fp16_tflops:g}",
            f"{gpu.fp32_tflops:g}",
            "" if gpu.fp8_tflops is None else f"{gpu.fp8_tflops:g}",
            gpu.compute_capability,
            f"{gpu.efficiency.share:g}{'' if gpu.efficiency.is_measured else '*'}",
            f"[datasheet]({gpu.source})",
        )
        assert f"| {' | '.join(figures)} |" in text


def test_the_document_tells_what_each_saving_saves(sdxl: Plan) -> None:
    fp32 = planned("sdxl", precision=Precision.FP32)
    unfused = planned("sdxl", is_fused=False)
    text = HARDWARE.read_text()
    for plan, way, saving in (
        (fp32, ("full", 2, 1536), "none: fp32"),
        (sdxl, ("full", 2, 1536), "fp16"),
        (unfused, ("full", 2, 1536), "fp16, but attention that is not fused"),
        (sdxl, ("full", 2, 768), "fp16, and the VAE in tiles of 768 pixels"),
        (sdxl, ("full", 2, 512), "fp16, and the VAE in tiles of 512 pixels"),
        (sdxl, ("low", 2, 1536), "fp16, and `--memory-profile low`"),
        (sdxl, ("low", 2, 512), "fp16, both"),
    ):
        assert f"| {saving} | {plan.memory_bytes(*way) / 1e9:.1f} GB |" in text
