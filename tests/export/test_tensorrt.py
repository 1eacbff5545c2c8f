"""What TensorRT is told to build, by Polygraphy's own code over a module like TensorRT's."""

import shutil
import sys
from pathlib import Path
from typing import Any

import fake_tensorrt
import onnx
import pytest
from onnx import TensorProto, helper

from darkroom.engine_fit import Gpu, Machine
from darkroom_export import ExportError
from darkroom_export.profiles import ShapeRange
from darkroom_export.tensorrt import EngineOptions, PhaseProgress, TensorRt, one_gpu

GPU = Gpu("NVIDIA H100", "9.0")
TENSORRT = TensorRt(GPU, "10.5.0")
SMALL = {"x": ShapeRange((1, 4), (2, 4), (8, 4))}
LARGE = {"x": ShapeRange((9, 4), (16, 4), (63, 4))}


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    # The same module in every test: Polygraphy imports it once.
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt)


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4])
    node = helper.make_node("Identity", ["x"], ["y"])
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(helper.make_graph([node], "identity", [x], [y])), path)
    return path


def build(graph: Path, *profiles: Any, **options: Any) -> tuple[dict[str, Any], list[str]]:
    lines: list[str] = []
    plan = graph.with_name("model.plan")
    TENSORRT.build(graph, plan, profiles or (SMALL,), EngineOptions(**options), lines.append)
    return fake_tensorrt.read_engine(plan), lines


def test_an_engine_takes_its_types_from_the_graph(graph: Path) -> None:
    engine, _ = build(graph)

    assert engine["strongly_typed"]
    # Neither float16 where the graph has none, nor TensorFloat32.
    assert engine["flags"] == []


def test_it_has_all_profiles_in_their_order(graph: Path) -> None:
    engine, _ = build(graph, SMALL, LARGE)

    assert engine["profiles"] == [
        {"x": [[1, 4], [2, 4], [8, 4]]},
        {"x": [[9, 4], [16, 4], [63, 4]]},
    ]


def test_it_is_built_as_the_options_say(graph: Path) -> None:
    engine, _ = build(
        graph,
        version_compatible=True,
        weight_streaming=True,
        optimization_level=5,
        workspace_bytes=2**30,
    )

    assert engine["flags"] == ["VERSION_COMPATIBLE", "WEIGHT_STREAMING"]
    assert engine["optimization_level"] == 5
    assert engine["pools"] == {"WORKSPACE": 2**30}


def test_what_was_measured_is_kept_for_the_next_build(graph: Path, tmp_path: Path) -> None:
    cache = tmp_path / "timing.cache"

    first, _ = build(graph, timing_cache=cache)
    second, _ = build(graph, timing_cache=cache)

    assert first["measured_before"] == ""
    assert second["measured_before"] == "measured;"
    assert cache.read_bytes().count(b"measured;") >= 2


def test_progress_is_told_by_tenths(graph: Path) -> None:
    _, lines = build(graph)

    assert lines == [f"Building Engine: {percent}%" for percent in range(10, 101, 10)]


def test_phases_that_are_short_or_deep_are_not_told() -> None:
    lines: list[str] = []
    progress = PhaseProgress(lines.append)
    progress.phase_start("outer", None, 2)
    progress.phase_start("inner", "outer", 10)
    progress.phase_start("innermost", "inner", 100)

    goes_on = [progress.step_complete(phase, 1) for phase in ("innermost", "inner", "outer")]
    progress.phase_finish("inner")
    progress.step_complete("inner", 2)

    assert goes_on == [True, True, True]
    assert lines == ["inner: 20%"]


@pytest.mark.parametrize("kind", [fake_tensorrt.UNPARSABLE, fake_tensorrt.UNBUILDABLE])
def test_a_graph_that_tensorrt_cannot_take_is_named(graph: Path, kind: str) -> None:
    bad = graph.with_name(f"{kind}.onnx")
    shutil.copyfile(graph, bad)

    with pytest.raises(ExportError, match=rf"{kind}\.onnx: no TensorRT engine, Polygraphy"):
        build(bad)

    assert not graph.with_name("model.plan").exists()


def test_an_engine_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    plan = tmp_path / "model.plan"
    plan.write_bytes(b"nothing")

    with pytest.raises(ExportError, match=r"model\.plan: cannot be loaded, .*deserialize"):
        TENSORRT.runners(plan)


@pytest.mark.parametrize("tolerance", [-0.1, 0.0, 1.0, float("nan")])
def test_a_tolerance_that_is_none_is_refused(tolerance: float) -> None:
    with pytest.raises(ExportError, match=f"tolerance: {tolerance:g} is not between 0 and 1"):
        EngineOptions(tolerance=tolerance)


@pytest.mark.parametrize("level", [-1, 6])
def test_an_optimization_level_that_is_none_is_refused(level: int) -> None:
    with pytest.raises(ExportError, match=f"optimization-level: {level} is not between 0 and 5"):
        EngineOptions(optimization_level=level)


def test_without_tensorrt_it_is_said_where_to_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "tensorrt")

    with pytest.raises(ExportError, match="inside the container that will serve"):
        TensorRt.here()


def test_a_tensorrt_without_its_libraries_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "tensorrt.py").write_text("raise ImportError('libnvinfer.so.11: not there')")
    monkeypatch.delitem(sys.modules, "tensorrt")
    monkeypatch.syspath_prepend(tmp_path)

    with pytest.raises(ExportError, match=r"cannot be loaded: libnvinfer\.so\.11: not there"):
        TensorRt.here()


def test_without_a_gpu_it_is_said_where_to_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")

    with pytest.raises(ExportError, match="no GPU is here"):
        TensorRt.here()


def test_engines_are_for_one_model_of_gpu() -> None:
    assert one_gpu(Machine((GPU, GPU), "10.5.0")) == GPU

    with pytest.raises(ExportError, match=r"NVIDIA H100 .*, NVIDIA L4 .*CUDA_VISIBLE_DEVICES"):
        one_gpu(Machine((GPU, Gpu("NVIDIA L4", "8.9")), "10.5.0"))
