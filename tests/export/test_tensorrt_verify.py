"""Engines are compared with their graphs by Polygraphy; two graphs stand for the two here."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from polygraphy.backend.base import BaseRunner

from darkroom_export import ExportError
from darkroom_export.profiles import Dimension, NetworkProfile, Span
from darkroom_export.tensorrt_inputs import Inputs
from darkroom_export.tensorrt_verify import (
    Difference,
    FewRows,
    compare_profiles,
    graph_runner,
)

MANIFEST: dict[str, Any] = {
    "noise_schedule": {"train_sigmas": [0.1] * 1000},
    "limits": {"max_size": 1024},
    "text": {"encoders": []},
    "variants": {},
}
INPUTS = {"x": (Dimension(1, "batch"), Dimension(2, "height"))}
PROFILES = [
    NetworkProfile(INPUTS, {"batch": Span(1, 2, 5), "height": Span(2, 2, 3)}),
    NetworkProfile(INPUTS, {"batch": Span(6, 7, 8), "height": Span.of(2)}),
]
NUM_CORNERS = 5 + 3


@pytest.fixture
def inputs(tmp_path: Path) -> Inputs:
    return Inputs("unet", MANIFEST, tmp_path)


def save(path: Path, *nodes: Any, factor: float = 1.0, outputs: tuple[str, ...] = ("y",)) -> Path:
    """A graph that multiplies `x` to `z`, of which the nodes make the outputs."""
    graph = helper.make_graph(
        [helper.make_node("Mul", ["x", "factor"], ["z"]), *nodes],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "2*height"])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [helper.make_tensor("factor", TensorProto.FLOAT, [], [factor])],
    )
    opset = helper.make_opsetid("", 18)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=9), path)
    return path


def graph(path: Path, operator: str = "Identity", **options: Any) -> BaseRunner:
    return graph_runner(save(path, helper.make_node(operator, ["z"], ["y"]), **options))


def compare(
    tmp_path: Path, inputs: Inputs, engine: BaseRunner, *, tolerance: float = 1e-2
) -> dict[str, Any]:
    numbers: list[int] = []

    def runner(number: int) -> BaseRunner:
        numbers.append(number)
        return engine

    reference = graph(tmp_path / "reference.onnx")
    record = compare_profiles(
        "unet", reference, runner, PROFILES, inputs=inputs, tolerance=tolerance
    )
    assert numbers == [0, 1]
    return record


def test_what_is_the_same_has_no_error(tmp_path: Path, inputs: Inputs) -> None:
    record = compare(tmp_path, inputs, graph(tmp_path / "engine.onnx"))

    assert record == {
        "error": 0.0,
        "errors": {"y": 0.0},
        "tolerance": 1e-2,
        "num_corners": NUM_CORNERS,
    }


def test_the_error_is_a_fraction_of_the_largest_value(tmp_path: Path, inputs: Inputs) -> None:
    record = compare(tmp_path, inputs, graph(tmp_path / "engine.onnx", factor=1.005))

    assert record["errors"]["y"] == pytest.approx(0.005, rel=1e-3)


def test_a_difference_is_found_and_named(tmp_path: Path, inputs: Inputs) -> None:
    with pytest.raises(
        ExportError,
        match=r"unet: y at x 2x4: the engine differs from its graph by 2\.00e-02 of its range, "
        r"allowed is 1e-02",
    ):
        compare(tmp_path, inputs, graph(tmp_path / "engine.onnx", factor=1.02))


def test_a_difference_at_one_corner_alone_is_found(tmp_path: Path, inputs: Inputs) -> None:
    """Past the seventh row everything is twice as large."""
    one = helper.make_tensor("one", TensorProto.FLOAT, [1], [1.0])
    engine = save(
        tmp_path / "engine.onnx",
        helper.make_node("Constant", [], ["seven"], value_ints=[7]),
        helper.make_node("Constant", [], ["end"], value_ints=[2**31]),
        helper.make_node("Constant", [], ["axis"], value_ints=[0]),
        helper.make_node("Constant", [], ["one"], value=one),
        helper.make_node("Slice", ["z", "seven", "end", "axis"], ["rest"]),
        helper.make_node("Slice", ["z", "axis", "seven", "axis"], ["first"]),
        helper.make_node("Add", ["rest", "rest"], ["twice"]),
        helper.make_node("Concat", ["first", "twice"], ["y"], axis=0),
    )

    with pytest.raises(ExportError, match="unet: y at x 8x4: the engine differs"):
        compare(tmp_path, inputs, whole(engine))


def whole(path: Path) -> BaseRunner:
    """Runs all rows at once, as an engine does."""
    from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx

    return OnnxrtRunner(SessionFromOnnx(str(path)))


def test_what_is_not_finite_is_found(tmp_path: Path, inputs: Inputs) -> None:
    with pytest.raises(ExportError, match=r"y at x 2x4: what the engine gives is not finite"):
        compare(tmp_path, inputs, graph(tmp_path / "engine.onnx", "Sqrt"))


def test_a_graph_that_is_not_finite_is_told_from_an_engine(tmp_path: Path, inputs: Inputs) -> None:
    reference, engine = (graph(tmp_path / f"{name}.onnx", "Log") for name in "ab")

    with pytest.raises(ExportError, match=r"y at x 2x4: what the graph gives is not finite"):
        compare_profiles(
            "unet", reference, lambda _: engine, PROFILES, inputs=inputs, tolerance=1.0
        )


def test_another_shape_is_found(tmp_path: Path, inputs: Inputs) -> None:
    engine = graph(tmp_path / "engine.onnx", "Transpose")

    with pytest.raises(
        ExportError, match=r"y at x .*: the engine gives \(\d, .*, the graph \(2, 4"
    ):
        compare(tmp_path, inputs, engine)


def test_other_outputs_are_found(tmp_path: Path, inputs: Inputs) -> None:
    engine = graph_runner(save(tmp_path / "engine.onnx", outputs=("z",)))

    with pytest.raises(ExportError, match=r"unet: the engine gives \['z'\], the graph \['y'\]"):
        compare(tmp_path, inputs, engine)


def test_other_inputs_are_found(tmp_path: Path, inputs: Inputs) -> None:
    engine = save(tmp_path / "engine.onnx", helper.make_node("Identity", ["z"], ["y"]))
    model = onnx.load(engine)
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 5
    onnx.save(model, engine)

    with pytest.raises(ExportError, match="unet at x 2x4: cannot be compared, Polygraphy"):
        compare(tmp_path, inputs, graph_runner(engine))


def test_what_is_not_a_number_is_not_within_the_tolerance() -> None:
    assert Difference(0.1, 0.1)
    assert not Difference(0.2, 0.1)
    assert not Difference(float("nan"), 0.1)


class Session:
    """Adds a number to each row, and remembers how many it got."""

    def __init__(self) -> None:
        self.num_rows: list[int] = []

    def get_inputs(self) -> None: ...

    def get_outputs(self) -> None: ...

    def run(self, _outputs: Any, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        self.num_rows.append(len(inputs["x"]))
        return [inputs["x"] + 1, inputs["t"]]


def test_graphs_run_in_few_rows() -> None:
    session = Session()
    x, t = np.arange(10.0).reshape(5, 2), np.arange(5.0)

    first, second = FewRows(session).run(None, {"x": x, "t": t})

    assert session.num_rows == [1] * 5
    np.testing.assert_array_equal(first, x + 1)
    np.testing.assert_array_equal(second, t)
