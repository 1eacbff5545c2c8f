"""The whole way of the GPU benchmark on the CPU, with the embedded checkpoint."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytestmark = pytest.mark.torch

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model():
    """The embedded checkpoint's, which is exported once for all tests that need it so."""
    from benchmarks.gpu.models import Model

    checkpoint, repository = ROOT / "shapes" / "checkpoint", ROOT / "build" / "shapes-torch"
    command = [sys.executable, "-m", "darkroom.cli", "export", str(checkpoint), str(repository)]
    subprocess.run([*command, "--backend", "torch"], check=True)
    return Model("sd15", checkpoint, repository, "fp32", "cpu")


@pytest.fixture(scope="module")
def measured(model, tmp_path_factory):
    from benchmarks.gpu import accuracy, card, models, speed, under_load
    from benchmarks.gpu.bench import Bench, Choices
    from benchmarks.gpu.clock import Clock
    from benchmarks.gpu.scale import SMALL
    from benchmarks.gpu.session import Session

    folder = tmp_path_factory.mktemp("gpu")
    scale = replace(
        SMALL,
        max_rows={"sd15": 4},
        rows=(2,),
        num_steps=2,
        mixed_steps=(1, 3),
        num_pairs=1,
        num_calls=2,
        num_compared=1,
        num_joins=1,
        full_s=0.5,
        load_s=1.0,
        shares=(0.9,),
        matmul_size=256,
        copied_bytes=2**20,
    )
    result = {"models": {"sd15": {}}, "environment": {"gpu": card.describe()}}
    session = Session(folder / "gpu.json", result, 600)
    session.run("card", 0, lambda: card.measure(Clock("cpu"), scale, models.DTYPES["fp32"]), result)
    bench = Bench(model, scale, session, Choices(configurations=("eager",)))
    store = result["models"]["sd15"]
    parts = {
        "network": speed.network,
        "check": accuracy.check,
        "steps": speed.steps,
        "solo": speed.solo,
        "saturated": speed.saturated,
        "exact": accuracy.exact,
        "load": under_load.load,
    }
    for name, part in parts.items():
        session.run(f"sd15/{name}", 0, lambda part=part: part(bench), store)
    bench.close()
    session.close()
    return json.loads((folder / "gpu.json").read_text())


def test_all_parts_are_measured(measured):
    assert measured["errors"] == {}
    assert set(measured["models"]["sd15"]) >= {"network", "check", "steps", "solo", "load"}


def test_our_loop_is_that_of_diffusers(measured):
    for request in measured["models"]["sd15"]["check"]["ours"]:
        assert request["latents"]["max_abs"] < 1e-3
        assert request["picture"]["max_levels"] <= 1


def test_a_batch_makes_the_pictures_of_lone_requests(measured):
    exact = measured["models"]["sd15"]["exact"]

    assert len(exact["batched"]) == exact["num_requests"] > 1
    for request in exact["batched"]:
        assert request["latents"]["max_abs"] < 1e-3


def test_the_rates_follow_from_the_times(measured):
    network = measured["models"]["sd15"]["network"]
    for entry in network["configurations"]["eager"]["denoiser"]:
        operations = entry["rows"] * network["denoiser_tflop"]

        expected = operations / (entry["ms"]["median"] / 1000)
        assert entry["tflops"] == pytest.approx(expected, rel=0.05, abs=1e-3)


def test_every_policy_has_the_same_arrivals(measured):
    (load,) = measured["models"]["sd15"]["load"]["loads"]
    arrivals = [[visit[0] for visit in of["visits"]] for of in load["policies"].values()]

    assert len(arrivals) == 3
    assert arrivals[0] == arrivals[1] == arrivals[2]


def test_the_report_shows_what_was_measured(measured):
    from benchmarks.gpu.report import text

    shown = text(measured)

    assert "sd15, check" in shown
    assert "step-level" in shown


def test_operations_of_full_size_are_those_of_the_architecture(tmp_path):
    """0.803 TFLOP a row of Stable Diffusion 1.5 at 512 pixels, 2.51 TFLOP a decoding."""
    from benchmarks.gpu.models import Model
    from benchmarks.gpu.networks import count_operations
    from darkroom_export.random_checkpoint import ARCHITECTURES

    parts = ARCHITECTURES["sd15"].parts
    for part in ("unet", "vae"):
        (tmp_path / part).mkdir()
        config = dict(parts[part].config)
        if part == "vae":
            config |= {
                "down_block_types": ["DownEncoderBlock2D"] * 4,
                "up_block_types": ["UpDecoderBlock2D"] * 4,
                "layers_per_block": 2,
            }
        (tmp_path / part / "config.json").write_text(json.dumps(config))
    manifest = {
        "limits": {"default_width": 512, "default_height": 512},
        "latents": {"channels": 4, "vae_scale_factor": 8},
        "denoiser": {"time_ids": []},
        "text": {"hidden_size": 768},
    }
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))

    counted = count_operations(Model("sd15", tmp_path, tmp_path, "fp32", "cpu"))

    assert counted.denoiser == pytest.approx(0.8033e12, rel=1e-3)
    assert counted.decoder == pytest.approx(2.5145e12, rel=1e-3)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--parts", "card,steam"], "'steam' does not exist, there are card, network, "),
        (["--models", "sd9"], "'sd9' does not exist, there are sd15, sdxl"),
        (["--policies", "luck"], "'luck' does not exist, there are step-level, "),
        (["--shares", "0.5,none"], "'0.5,none' is no list of shares"),
        (["--shares", "0"], "'0' is no list of shares"),
    ],
)
def test_a_bad_argument_is_named(arguments, problem, capsys):
    from benchmarks.gpu.__main__ import parse

    with pytest.raises(SystemExit) as end:
        parse(arguments)

    assert end.value.code == 2
    assert problem in capsys.readouterr().err
