"""The model that runs an ONNX graph, over small real ones."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import triton_python_backend_utils as pb_utils
from network_calls import SAMPLE, TIMESTEP, config, request
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


Load = Callable[..., Any]


@pytest.fixture
def load(load_network: Callable[[str], Load]) -> Load:
    """Initializes the model over a folder."""
    return load_network("onnx_network")


@pytest.fixture
def model(graph: Path, load: Load) -> Any:
    """The initialized model."""
    return load(graph, config(sample=[3], timestep=[1]))


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
        ({"sample": SAMPLE}, "timestep: is missing"),
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


def test_a_missing_graph_stops_the_start(graph: Path, load: Load) -> None:
    (graph / "1" / "model.onnx").unlink()

    with pytest.raises(Exception, match=r"model\.onnx"):
        load(graph, config(sample=[3], timestep=[1]))


def write_graph(folder: Path, nodes: list[Any], inputs: list[Any], outputs: list[Any]) -> Path:
    from onnx import helper

    (folder / "1").mkdir(parents=True)
    made = helper.make_graph(nodes, "unet", inputs, outputs)
    opsets = [helper.make_opsetid("", 18)]
    onnx.save(
        helper.make_model(made, opset_imports=opsets, ir_version=9), folder / "1" / "model.onnx"
    )
    return folder


def tensor(name: str, *shape: str | int) -> Any:
    from onnx import TensorProto, helper

    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


# Inputs that may be left out.

RESIDUALS = {
    "down_block_res_sample_0": {"channels": 3, "divisor": 1, "like": "sample"},
    "mid_block_res_sample": {"channels": 2, "divisor": 2, "like": "sample"},
}


@pytest.fixture
def controlled(tmp_path: Path, load: Load) -> Any:
    """A model whose outputs are the two residuals, plus the sum of the sample."""
    from onnx import helper

    nodes = [
        helper.make_node("Mul", ["sample", "zero"], ["nothing"]),
        helper.make_node("ReduceSum", ["nothing"], ["sum"], keepdims=0),
        *(helper.make_node("Add", [name, "sum"], [f"out_{name}"]) for name in RESIDUALS),
    ]
    zero = helper.make_node(
        "Constant", [], ["zero"], value=helper.make_tensor("zero", onnx.TensorProto.FLOAT, [], [0])
    )
    sample = tensor("sample", "batch", 3, "height", "width")
    shapes = {
        "down_block_res_sample_0": ("batch", 3, "height", "width"),
        "mid_block_res_sample": ("batch", 2, "half height", "half width"),
    }
    folder = write_graph(
        tmp_path / "unet",
        [zero, *nodes],
        [sample, *(tensor(name, *shape) for name, shape in shapes.items())],
        [tensor(f"out_{name}", *shape) for name, shape in shapes.items()],
    )
    made = model_config_pb2.ModelConfig(name="unet", backend="python", max_batch_size=63)
    for name in ("sample", *RESIDUALS):
        made.input.add(name=name, data_type=model_config_pb2.TYPE_FP32, dims=[-1, -1, -1])
    for name in RESIDUALS:
        made.output.add(name=f"out_{name}", data_type=model_config_pb2.TYPE_FP32, dims=[-1])
    made.parameters["intra_op_thread_count"].string_value = "1"
    return load(folder, made, optional_inputs=json.dumps(RESIDUALS))


def test_optional_inputs_that_are_left_out_are_zeros_of_the_batchs_size(controlled: Any) -> None:
    (response,) = controlled.execute([request(sample=np.ones((2, 3, 4, 6), np.float32))])

    down, middle = (out.as_numpy() for out in response.output_tensors())
    assert (down.shape, middle.shape) == ((2, 3, 4, 6), (2, 2, 2, 3))
    assert not down.any()
    assert not middle.any()


def test_optional_inputs_that_are_given_count(controlled: Any) -> None:
    given = np.arange(12, dtype=np.float32).reshape(1, 2, 2, 3)

    sample = np.ones((1, 3, 4, 6), np.float32)
    (response,) = controlled.execute([request(sample=sample, mid_block_res_sample=given)])

    down, middle = (out.as_numpy() for out in response.output_tensors())
    assert not down.any()
    assert middle.tolist() == given.tolist()


def test_what_is_not_optional_is_missing_all_the_same(controlled: Any) -> None:
    (response,) = controlled.execute([request(mid_block_res_sample=np.ones((1, 2, 2, 3)))])

    assert response.error().message() == "sample: is missing"


# Adapters.

WIDTH_IN, WIDTH_OUT = 3, 2
LAYERS = ("attn.to_q", "attn.to_k")


@pytest.fixture
def adapters() -> dict[str, dict[str, np.ndarray]]:
    """By name, the weights of two adapters of ranks 2 and 1; the second leaves one layer alone."""
    rng = np.random.default_rng(0)

    def weights(rank: int, *layers: str) -> dict[str, np.ndarray]:
        made = {}
        for layer in layers:
            made[f"{layer}.down"] = rng.standard_normal((rank, WIDTH_IN), np.float32)
            made[f"{layer}.up"] = rng.standard_normal((WIDTH_OUT, rank), np.float32)
        return made

    return {"ink": weights(2, *LAYERS), "pixelart": weights(1, LAYERS[1])}


def adapted_graph(folder: Path) -> Path:
    """out_sample = the sum over the layers of ((sample down^T) * scale) up^T."""
    from onnx import helper

    nodes = []
    for number, layer in enumerate(LAYERS):
        nodes += [
            helper.make_node("Transpose", [f"{layer}.lora_down"], [f"down{number}"]),
            helper.make_node("Transpose", [f"{layer}.lora_up"], [f"up{number}"]),
            helper.make_node("MatMul", ["sample", f"down{number}"], [f"a{number}"]),
            helper.make_node("Mul", [f"a{number}", "lora_scale"], [f"b{number}"]),
            helper.make_node("MatMul", [f"b{number}", f"up{number}"], [f"c{number}"]),
        ]
    nodes.append(helper.make_node("Add", ["c0", "c1"], ["out_sample"]))
    inputs = [tensor("sample", "batch", WIDTH_IN), tensor("lora_scale", "batch", "rank")]
    for layer in LAYERS:
        inputs.append(tensor(f"{layer}.lora_down", "rank", WIDTH_IN))
        inputs.append(tensor(f"{layer}.lora_up", WIDTH_OUT, "rank"))
    return write_graph(folder, nodes, inputs, [tensor("out_sample", "batch", WIDTH_OUT)])


def adapted_config() -> Any:
    made = model_config_pb2.ModelConfig(name="unet", backend="python", max_batch_size=63)
    made.input.add(name="sample", data_type=model_config_pb2.TYPE_FP32, dims=[WIDTH_IN])
    made.input.add(
        name="lora_scale", data_type=model_config_pb2.TYPE_FP32, dims=[-1], optional=True
    )
    made.output.add(name="out_sample", data_type=model_config_pb2.TYPE_FP32, dims=[WIDTH_OUT])
    made.parameters["intra_op_thread_count"].string_value = "1"
    return made


@pytest.fixture
def adapted(tmp_path: Path, load: Load, adapters: dict[str, dict[str, np.ndarray]]) -> Any:
    from safetensors.numpy import save_file

    folder = adapted_graph(tmp_path / "unet")
    (folder / "1" / "adapters").mkdir()
    for name, weights in adapters.items():
        save_file(weights, folder / "1" / "adapters" / f"{name}.safetensors")
    return load(folder, adapted_config(), lora_names=json.dumps(sorted(adapters)))


def expected_row(
    adapters: dict[str, dict[str, np.ndarray]], row: np.ndarray, *scales: float
) -> Any:
    output = np.zeros(WIDTH_OUT)
    for (_, weights), scale in zip(sorted(adapters.items()), scales, strict=True):
        for layer in LAYERS:
            if f"{layer}.down" in weights:
                change = weights[f"{layer}.up"] @ weights[f"{layer}.down"]
                output += scale * (change @ row)
    return output


@pytest.mark.parametrize(
    "scales",
    [
        [(1, 0), (0, 1), (0.5, -2), (0, 0)],
        [(1, 0), (0.25, 0)],
        [(0, 1)],
        [(0, 0), (0, 0)],
    ],
    ids=["different", "one adapter", "the other", "none"],
)
def test_each_row_gets_its_own_share_of_every_adapter(
    adapted: Any, adapters: dict[str, dict[str, np.ndarray]], scales: list[tuple[float, float]]
) -> None:
    sample = np.random.default_rng(1).standard_normal((len(scales), WIDTH_IN), np.float32)

    (response,) = adapted.execute([request(sample=sample, lora_scale=np.array(scales, np.float32))])

    (output,) = response.output_tensors()
    expected = [expected_row(adapters, row, *own) for row, own in zip(sample, scales, strict=True)]
    np.testing.assert_allclose(output.as_numpy(), expected, atol=1e-5)


def test_without_scales_no_adapter_is_used(adapted: Any) -> None:
    (response,) = adapted.execute([request(sample=np.ones((3, WIDTH_IN), np.float32))])

    (output,) = response.output_tensors()
    assert output.as_numpy().tolist() == [[0, 0]] * 3


@pytest.mark.parametrize("shape", [(2, 3), (1, 2), (2,)], ids=str)
def test_scales_of_another_shape_are_refused(adapted: Any, shape: tuple[int, ...]) -> None:
    sample = np.ones((2, WIDTH_IN), np.float32)

    (response,) = adapted.execute([request(sample=sample, lora_scale=np.ones(shape, np.float32))])

    message = f"lora_scale: has shape {shape}, for 2 rows and 2 adapters"
    assert response.error().message() == message


def test_only_so_many_sets_of_adapters_are_kept_stacked(
    tmp_path: Path, load: Load, adapters: dict[str, dict[str, np.ndarray]]
) -> None:
    from safetensors.numpy import save_file

    folder = adapted_graph(tmp_path / "unet")
    (folder / "1" / "adapters").mkdir()
    names = [f"style{number}" for number in range(6)]
    for name in names:
        save_file(adapters["ink"], folder / "1" / "adapters" / f"{name}.safetensors")
    model = load(folder, adapted_config(), lora_names=json.dumps(names))
    sample = np.ones((1, WIDTH_IN), np.float32)
    columns = np.eye(6, dtype=np.float32)

    for scale in [*(columns[0] + columns), *(columns[0] + columns)]:
        (response,) = model.execute([request(sample=sample, lora_scale=np.array([scale]))])
        (output,) = response.output_tensors()
        expected = sum(scale) * expected_row({"ink": adapters["ink"]}, sample[0], 1.0)
        np.testing.assert_allclose(output.as_numpy()[0], expected, atol=1e-5)

    assert len(model._adapters._stacks) == 4


def test_a_graph_with_adapter_inputs_runs_without_adapters(tmp_path: Path, load: Load) -> None:
    model = load(adapted_graph(tmp_path / "unet"), adapted_config())

    (response,) = model.execute([request(sample=np.ones((2, WIDTH_IN), np.float32))])

    (output,) = response.output_tensors()
    assert output.as_numpy().tolist() == [[0, 0]] * 2


def test_a_graph_without_adapter_inputs_refuses_scales(model: Any) -> None:
    scale = np.ones((2, 1), np.float32)
    (response,) = model.execute([request(sample=SAMPLE, timestep=TIMESTEP, lora_scale=scale)])

    message = "lora_scale: has shape (2, 1), for 2 rows and 0 adapters"
    assert response.error().message() == message


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"attn.to_q.down": (1, 4), "attn.to_q.up": (2, 1)}, r"attn\.to_q\.down of \(1, 4\)"),
        ({"attn.to_q.down": (1, 3), "attn.to_q.up": (2, 2)}, r"attn\.to_q\.up of \(2, 2\)"),
        ({"attn.to_v.down": (1, 3), "attn.to_v.up": (2, 1)}, r"attn\.to_v\.down"),
        ({"attn.to_q.alpha": (1,)}, r"attn\.to_q\.alpha"),
    ],
    ids=["width", "rank", "layer", "part"],
)
def test_an_adapter_of_another_graph_stops_the_start(
    tmp_path: Path, load: Load, weights: dict[str, tuple[int, ...]], message: str
) -> None:
    from safetensors.numpy import save_file

    folder = adapted_graph(tmp_path / "unet")
    (folder / "1" / "adapters").mkdir()
    tensors = {key: np.ones(shape, np.float32) for key, shape in weights.items()}
    save_file(tensors, folder / "1" / "adapters" / "ink.safetensors")

    with pytest.raises(ValueError, match=rf"ink\.safetensors: {message}.* does not fit the graph"):
        load(folder, adapted_config(), lora_names='["ink"]')


def test_a_missing_adapter_stops_the_start(tmp_path: Path, load: Load) -> None:
    with pytest.raises(FileNotFoundError, match=r"ink\.safetensors"):
        load(adapted_graph(tmp_path / "unet"), adapted_config(), lora_names='["ink"]')


@pytest.mark.parametrize("disabled", ["", "ConstantFolding", "ConstantFolding, MatMulAddFusion"])
def test_optimizers_can_be_left_out(graph: Path, load: Load, disabled: str) -> None:
    made = config(sample=[3], timestep=[1])
    model = load(graph, made, disabled_optimizers=disabled)

    (response,) = model.execute([request("noise", sample=SAMPLE, timestep=TIMESTEP)])

    assert response.output_tensors()[0].as_numpy().tolist() == (-SAMPLE).tolist()
