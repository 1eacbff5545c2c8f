"""The model that runs an ONNX graph, over a small real one."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import triton_python_backend_utils as pb_utils
from tritonclient.grpc import model_config_pb2

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    """A repository's model folder: out_sample = sample * timestep, noise = -sample, unused."""
    from onnx import TensorProto, helper

    def tensor(name: str, *shape: str | int) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    nodes = [
        helper.make_node("Unsqueeze", ["timestep", "axes"], ["column"]),
        helper.make_node("Mul", ["sample", "column"], ["out_sample"]),
        helper.make_node("Neg", ["sample"], ["noise"]),
        helper.make_node("Abs", ["sample"], ["unused"]),
    ]
    made = helper.make_graph(
        nodes,
        "unet",
        [tensor("sample", "batch", 3), tensor("timestep", "batch")],
        [tensor(name, "batch", 3) for name in ("out_sample", "noise", "unused")],
        [helper.make_tensor("axes", TensorProto.INT64, [1], [1])],
    )
    opsets = [helper.make_opsetid("", 18)]
    (tmp_path / "unet" / "1").mkdir(parents=True)
    path = tmp_path / "unet" / "1" / "model.onnx"
    onnx.save(helper.make_model(made, opset_imports=opsets, ir_version=9), path)
    return tmp_path / "unet"


def config(**inputs: list[int]) -> Any:
    made = model_config_pb2.ModelConfig(name="unet", backend="python", max_batch_size=63)
    for name, dims in inputs.items():
        entry = made.input.add(name=name, data_type=model_config_pb2.TYPE_FP32, dims=dims)
        if name == "timestep":
            entry.reshape.SetInParent()
    for name in ("out_sample", "noise"):
        made.output.add(name=name, data_type=model_config_pb2.TYPE_FP32, dims=[3])
    made.parameters["intra_op_thread_count"].string_value = "1"
    return made


@pytest.fixture
def model(
    graph: Path, load_model: Callable[[str], ModuleType], as_triton_tells_it: Callable[[Any], str]
) -> Any:
    """The initialized model."""
    model = load_model("onnx_network").TritonPythonModel()
    model.initialize(
        {
            "model_config": as_triton_tells_it(config(sample=[3], timestep=[1])),
            "model_repository": str(graph),
            "model_version": "1",
            "model_name": "unet",
        }
    )
    return model


def request(*wanted: str, **arrays: np.ndarray) -> pb_utils.InferenceRequest:
    return pb_utils.InferenceRequest(
        requested_output_names=wanted,
        inputs=[pb_utils.Tensor(name, array) for name, array in arrays.items()],
    )


SAMPLE = np.array([[1, 2, 3], [4, 5, 6]], np.float32)
TIMESTEP = np.array([[10], [100]], np.float32)
"""As Triton sends it: with a dimension beside the batch, of which the graph knows nothing."""


def test_it_answers_the_outputs_of_its_config_and_no_others(model: Any) -> None:
    (response,) = model.execute([request(sample=SAMPLE, timestep=TIMESTEP)])

    assert not response.has_error()
    output, noise = response.output_tensors()
    assert (output.name(), noise.name()) == ("out_sample", "noise")
    assert output.as_numpy().tolist() == [[10, 20, 30], [400, 500, 600]]
    assert noise.as_numpy().tolist() == (-SAMPLE).tolist()
    assert output.as_numpy().dtype == np.float32


@pytest.mark.parametrize(
    "wanted", [("out_sample",), ("noise",), ("noise", "out_sample")], ids=",".join
)
def test_it_answers_what_is_requested_and_no_more(model: Any, wanted: tuple[str, ...]) -> None:
    (response,) = model.execute([request(*wanted, sample=SAMPLE, timestep=TIMESTEP)])

    expected = {"out_sample": [[10, 20, 30], [400, 500, 600]], "noise": (-SAMPLE).tolist()}
    answered = {out.name(): out.as_numpy().tolist() for out in response.output_tensors()}
    assert answered == {name: expected[name] for name in wanted}


def test_batch_sizes_may_differ_between_requests(model: Any) -> None:
    responses = model.execute(
        [request(sample=SAMPLE[:n], timestep=TIMESTEP[:n]) for n in (1, 2, 1)]
    )

    lengths = [len(response.output_tensors()[0].as_numpy()) for response in responses]
    assert lengths == [1, 2, 1]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"sample": SAMPLE[:, :2], "timestep": TIMESTEP}, "sample"),
        ({"sample": SAMPLE.astype(np.float64), "timestep": TIMESTEP}, "data type"),
        ({"sample": SAMPLE, "timestep": np.zeros((3, 1), np.float32)}, "broadcast"),
        ({"sample": SAMPLE}, ""),
    ],
    ids=["shape", "type", "rows that do not agree", "missing"],
)
def test_a_failure_is_an_error_of_its_request_alone(
    model: Any, arrays: dict[str, np.ndarray], message: str
) -> None:
    good = request(sample=SAMPLE, timestep=TIMESTEP)
    before, failed, after = model.execute([good, request(**arrays), good])

    assert failed.has_error()
    assert message in failed.error().message()
    assert failed.error().code() == pb_utils.TritonError.INTERNAL
    assert failed.output_tensors() == []
    assert not before.has_error()
    assert not after.has_error()


def test_a_missing_graph_stops_the_start(
    graph: Path, load_model: Callable[[str], ModuleType], as_triton_tells_it: Callable[[Any], str]
) -> None:
    (graph / "1" / "model.onnx").unlink()
    arguments = {
        "model_config": as_triton_tells_it(config(sample=[3], timestep=[1])),
        "model_repository": str(graph),
        "model_version": "1",
    }

    with pytest.raises(Exception, match=r"model\.onnx"):
        load_model("onnx_network").TritonPythonModel().initialize(arguments)
