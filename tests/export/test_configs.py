"""Every backend's config.pbtxt: by Triton's schema, with the values that the backend reads."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import onnx
import pytest
from google.protobuf import text_format
from onnx import TensorProto, helper
from tritonclient.grpc import model_config_pb2

from darkroom_export import ExportError
from darkroom_export.backend import Backend
from darkroom_export.config_check import check_config
from darkroom_export.configs import (
    MODEL_FILES,
    Description,
    OnnxRuntimeOptions,
    Options,
    PythonOptions,
    Tensor,
    TensorRtOptions,
    TorchOptions,
    config_text,
    native_config,
    read_config,
)
from darkroom_export.repository import templates, write_python_models

RESIDUAL = "mid_block_res_sample"
FILLED = json.dumps({RESIDUAL: {"channels": 8, "divisor": 2, "like": "sample"}})
UNET = Description(
    name="unet",
    inputs=(
        Tensor("sample", "TYPE_FP32", (4, -1, -1)),
        Tensor("timestep", "TYPE_FP32", ()),
        Tensor("encoder_hidden_states", "TYPE_FP32", (-1, 96)),
        Tensor(RESIDUAL, "TYPE_FP32", (8, -1, -1), is_optional=True),
    ),
    outputs=(Tensor("out_sample", "TYPE_FP32", (4, -1, -1)),),
    max_batch_size=63,
    parameters={"optional_inputs": FILLED},
)
ADAPTABLE = replace(
    UNET,
    inputs=(*UNET.inputs, Tensor("lora_scale", "TYPE_FP32", (-1,), is_optional=True)),
    parameters={"optional_inputs": FILLED, "lora_names": '["ink"]'},
)
PYTHON_TEXT = """\
name: "unet"
max_batch_size: 63
input {
  name: "sample"
  data_type: TYPE_FP32
  dims: 4
  dims: -1
  dims: -1
}
input {
  name: "timestep"
  data_type: TYPE_FP32
  dims: 1
  reshape {
  }
}
input {
  name: "encoder_hidden_states"
  data_type: TYPE_FP32
  dims: -1
  dims: 96
}
output {
  name: "out_sample"
  data_type: TYPE_FP32
  dims: 4
  dims: -1
  dims: -1
}
instance_group {
  count: 1
  kind: KIND_CPU
}
parameters {
  key: "intra_op_thread_count"
  value {
    string_value: "0"
  }
}
backend: "python"
"""
"""What every exported repository has had."""


class Range(NamedTuple):
    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]


def profile(batches: tuple[int, int, int], sides: tuple[int, int, int]) -> dict[str, Range]:
    def of(sizes: Sequence[tuple[int, ...]]) -> Range:
        return Range(*((batch, *size) for batch, size in zip(batches, sizes, strict=True)))

    return {
        "sample": of([(4, side, side) for side in sides]),
        "timestep": of([(), (), ()]),
        "encoder_hidden_states": of([(77, 96), (77, 96), (154, 96)]),
        RESIDUAL: of([(8, side // 2, side // 2) for side in sides]),
    }


SMALL, LARGE = profile((1, 4, 16), (8, 16, 32)), profile((1, 2, 4), (32, 64, 64))
ALL_OPTIONS: Mapping[str, Options] = {
    "python": PythonOptions(),
    "torch": TorchOptions(),
    "torch-on-one-gpu": TorchOptions(device="cuda:1"),
    "onnxruntime-cpu": OnnxRuntimeOptions(is_on_gpu=False),
    "onnxruntime-cuda": OnnxRuntimeOptions(),
    "onnxruntime-tensorrt": OnnxRuntimeOptions(
        accelerator="tensorrt", profile=SMALL, engine_cache="/engines", is_half=True
    ),
    "tensorrt": TensorRtOptions([SMALL, LARGE], gpus=(0, 1), graph_batches=(1, 2, 4, 8, 16)),
}


def made(options: Options, description: Description = UNET) -> Any:
    """A config that went through its text, which the schema has to take."""
    text = config_text(native_config(description, options))
    return text_format.Parse(text, model_config_pb2.ModelConfig())


def parameters(config: Any) -> dict[str, str]:
    return {key: entry.string_value for key, entry in config.parameters.items()}


def kind_of(config: Any) -> tuple[str, int, list[int]]:
    (group,) = config.instance_group
    return (
        model_config_pb2.ModelInstanceGroup.Kind.Name(group.kind),
        group.count,
        list(group.gpus),
    )


@pytest.mark.parametrize("options", ALL_OPTIONS.values(), ids=ALL_OPTIONS)
def test_the_tensors_are_the_same_for_all_backends(options: Options) -> None:
    config = made(options)

    assert config.name == "unet"
    assert [entry.name for entry in config.input] == [tensor.name for tensor in UNET.inputs]
    assert {entry.data_type for entry in config.input} == {model_config_pb2.TYPE_FP32}
    sample, timestep, hidden, residual = config.input
    assert list(sample.dims) == [4, -1, -1]
    assert list(hidden.dims) == [-1, 96]
    assert list(residual.dims) == [8, -1, -1]
    # Triton wants a dimension besides the batch, which the network does not see.
    assert list(timestep.dims) == [1]
    assert timestep.HasField("reshape")
    assert not timestep.reshape.shape
    (output,) = config.output
    assert (output.name, list(output.dims)) == ("out_sample", [4, -1, -1])


@pytest.mark.parametrize("options", ALL_OPTIONS.values(), ids=ALL_OPTIONS)
def test_only_our_own_runners_have_optional_inputs(options: Options) -> None:
    optional = [entry.name for entry in made(options).input if entry.optional]

    assert optional == ([RESIDUAL] if options.backend in (Backend.PYTHON, Backend.TORCH) else [])


@pytest.mark.parametrize("options", ALL_OPTIONS.values(), ids=ALL_OPTIONS)
def test_a_description_is_read_back_from_any_config(options: Options) -> None:
    assert Description.from_config(made(options)) == UNET


def test_the_python_config_is_what_it_always_was() -> None:
    plain = replace(UNET, inputs=UNET.inputs[:3], parameters={})

    assert config_text(native_config(plain)) == PYTHON_TEXT


def test_a_python_config_tells_its_runner_what_to_fill_in() -> None:
    config = made(PythonOptions(intra_op_thread_count=3), ADAPTABLE)

    assert config.backend == "python"
    assert kind_of(config) == ("KIND_CPU", 1, [])
    assert parameters(config) == {
        "intra_op_thread_count": "3",
        "optional_inputs": FILLED,
        "lora_names": '["ink"]',
    }


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        (TorchOptions(), ("KIND_AUTO", 1, [])),
        (TorchOptions(gpus=(0, 2)), ("KIND_AUTO", 1, [0, 2])),
        (TorchOptions(device="cuda"), ("KIND_GPU", 1, [])),
        (TorchOptions(device="cuda:3"), ("KIND_GPU", 1, [3])),
        (TorchOptions(device="cpu"), ("KIND_CPU", 1, [])),
    ],
)
def test_a_torch_config_has_an_instance_for_each_gpu(
    options: TorchOptions, kind: tuple[str, int, list[int]]
) -> None:
    config = made(options)

    assert config.backend == "python"
    assert kind_of(config) == kind
    assert parameters(config) == {"device": options.device, "optional_inputs": FILLED}


def test_a_torch_config_has_its_runners_settings() -> None:
    config = made(TorchOptions(parameters={"compile": "1", "row_buckets": "1,2"}), ADAPTABLE)

    assert parameters(config) == {
        "compile": "1",
        "device": "auto",
        "lora_names": '["ink"]',
        "optional_inputs": FILLED,
        "row_buckets": "1,2",
    }


def test_onnxruntime_on_the_cpu() -> None:
    config = made(OnnxRuntimeOptions(is_on_gpu=False, intra_op_thread_count=4))

    assert (config.backend, config.default_model_filename) == ("onnxruntime", "model.onnx")
    assert config.max_batch_size == 63
    assert kind_of(config) == ("KIND_CPU", 1, [])
    assert not config.HasField("optimization")
    assert parameters(config) == {
        "inter_op_thread_count": "0",
        "intra_op_thread_count": "4",
        "optional_inputs": FILLED,
    }


def test_onnxruntime_on_cuda() -> None:
    config = made(
        OnnxRuntimeOptions(
            gpus=(0, 1),
            accelerator_parameters={"cudnn_conv_use_max_workspace": "1", "gpu_mem_limit": "1000"},
        )
    )

    assert kind_of(config) == ("KIND_GPU", 1, [0, 1])
    (accelerator,) = config.optimization.execution_accelerators.gpu_execution_accelerator
    assert accelerator.name == "cuda"
    assert dict(accelerator.parameters) == {"cudnn_conv_use_max_workspace": "1"}
    # The backend would set these to its defaults if they stood with the accelerator.
    assert parameters(config)["gpu_mem_limit"] == "1000"
    assert parameters(config)["cudnn_conv_algo_search"] == "1"


def test_onnxruntime_over_tensorrt() -> None:
    config = made(ALL_OPTIONS["onnxruntime-tensorrt"])

    (accelerator,) = config.optimization.execution_accelerators.gpu_execution_accelerator
    assert accelerator.name == "tensorrt"
    shapes = (
        f"sample:{{0}}x4x{{1}}x{{1}},timestep:{{0}},encoder_hidden_states:{{0}}x{{2}}x96,"
        f"{RESIDUAL}:{{0}}x8x{{3}}x{{3}}"
    )
    assert dict(accelerator.parameters) == {
        "precision_mode": "FP16",
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": "/engines",
        "trt_profile_min_shapes": shapes.format(1, 8, 77, 4),
        "trt_profile_opt_shapes": shapes.format(4, 16, 77, 8),
        "trt_profile_max_shapes": shapes.format(16, 32, 154, 16),
    }
    assert config.max_batch_size == 16


def test_onnxruntime_over_tensorrt_needs_neither_profile_nor_cache() -> None:
    config = made(OnnxRuntimeOptions(accelerator="tensorrt"))

    (accelerator,) = config.optimization.execution_accelerators.gpu_execution_accelerator
    assert dict(accelerator.parameters) == {"precision_mode": "FP32"}
    assert config.max_batch_size == 63


def test_every_instance_of_tensorrt_has_every_profile() -> None:
    config = made(ALL_OPTIONS["tensorrt"])

    assert (config.backend, config.default_model_filename) == ("tensorrt", "model.plan")
    assert kind_of(config) == ("KIND_GPU", 1, [0, 1])
    assert list(config.instance_group[0].profile) == ["0", "1"]
    # That of the largest profile, and not that of the graph.
    assert config.max_batch_size == 16
    assert config.optimization.cuda.busy_wait_events
    assert config.optimization.cuda.output_copy_stream


def test_cuda_graphs_are_of_every_batch_size_at_every_profiles_best_shape() -> None:
    config = made(ALL_OPTIONS["tensorrt"])

    cuda = config.optimization.cuda
    assert cuda.graphs
    found = [
        (spec.graph_lower_bound.batch_size, spec.batch_size, list(spec.input["sample"].dim))
        for spec in cuda.graph_spec
    ]
    small, large = [4, 16, 16], [4, 64, 64]
    assert found == [
        *[(1, 1, small), (2, 2, small), (3, 4, small), (5, 8, small), (9, 16, small)],
        *[(1, 1, large), (2, 2, large), (3, 4, large)],
    ]
    for spec in cuda.graph_spec:
        # All inputs have to be there, those of one number a row with no dimension.
        assert set(spec.input) == {tensor.name for tensor in UNET.inputs}
        assert not spec.input["timestep"].dim
        assert list(spec.input["encoder_hidden_states"].dim) == [77, 96]
        # Rows may be more than a call's, pictures not larger.
        assert spec.graph_lower_bound.input == spec.input


def test_a_shape_that_two_profiles_are_best_at_is_captured_once() -> None:
    halves = [profile((1, 2, 2), (8, 16, 32)), profile((3, 4, 4), (8, 16, 32))]

    specs = made(TensorRtOptions(halves, graph_batches=(1, 2, 4))).optimization.cuda.graph_spec
    both = made(TensorRtOptions([SMALL, SMALL], graph_batches=(1, 2))).optimization.cuda.graph_spec

    bounds = [(spec.graph_lower_bound.batch_size, spec.batch_size) for spec in specs]
    assert bounds == [(1, 1), (2, 2), (3, 4)]
    assert [spec.batch_size for spec in both] == [1, 2]


def test_no_cuda_graphs_where_none_are_asked_for() -> None:
    cuda = made(TensorRtOptions([SMALL])).optimization.cuda

    assert not cuda.graphs
    assert not cuda.graph_spec


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            OnnxRuntimeOptions(accelerator="openvino"),
            "accelerator: 'openvino' is none, allowed are cuda, tensorrt",
        ),
        (
            TorchOptions(device="tpu"),
            "device: 'tpu' is none, allowed are auto, cpu, cuda, cuda:N",
        ),
        (
            TorchOptions(device="cuda:x"),
            "device: 'cuda:x' is none, allowed are auto, cpu, cuda, cuda:N",
        ),
        (TensorRtOptions([]), "unet: an engine has one profile at least"),
        (
            TensorRtOptions([SMALL], graph_batches=(32, 64)),
            r"graph_batches: \(32, 64\) has none of 1 to 16",
        ),
        (
            TensorRtOptions([{"sample": SMALL["sample"]}]),
            (
                "unet: the profile has the inputs sample, the network has encoder_hidden_states, "
                "mid_block_res_sample, sample, timestep"
            ),
        ),
        (
            TensorRtOptions([{**SMALL, "timestep": Range((1,), (2,), (8,))}]),
            r"unet: the profile's inputs have different batches, \[8, 16\]",
        ),
        (
            TensorRtOptions([{**SMALL, "timestep": Range((1, 1), (4, 1), (16, 1))}]),
            r"unet: timestep: the profile's min is \(1, 1\), the network takes \('batch',\)",
        ),
        (
            OnnxRuntimeOptions(
                accelerator="tensorrt",
                profile={**SMALL, RESIDUAL: Range((1, 8, 4, 4), (4, 8, 8, 8), (16, 9, 16, 16))},
            ),
            (
                r"unet: mid_block_res_sample: the profile's max is \(16, 9, 16, 16\), the network "
                r"takes \('batch', 8, -1, -1\)"
            ),
        ),
    ],
)
def test_what_no_server_could_take_is_refused(options: Options, message: str) -> None:
    with pytest.raises(ExportError, match=f"^{message}$"):
        native_config(UNET, options)


@pytest.mark.parametrize("name", ["onnxruntime-cpu", "onnxruntime-cuda", "tensorrt"])
def test_adapters_are_for_our_own_runners(name: str) -> None:
    with pytest.raises(ExportError, match=r"^unet: takes LoRA adapters, whose weights are no part"):
        native_config(ADAPTABLE, ALL_OPTIONS[name])


def test_a_field_that_triton_does_not_know_is_found(tmp_path: Path) -> None:
    (tmp_path / "config.pbtxt").write_text('name: "unet" optimization { cuda { graphz: true } }')

    with pytest.raises(ExportError, match=r"config.pbtxt: ParseError: .*graphz"):
        read_config(tmp_path)
    with pytest.raises(ExportError, match=r"missing.config.pbtxt: FileNotFoundError"):
        read_config(tmp_path / "missing")


Sizes = Sequence[int | str]
INPUTS: Mapping[str, tuple[int, Sizes]] = {
    "sample": (TensorProto.FLOAT, ("batch", 4, "8*height", "8*width")),
    "timestep": (TensorProto.FLOAT, ("batch",)),
    "encoder_hidden_states": (TensorProto.FLOAT, ("batch", "sequence", 96)),
    RESIDUAL: (TensorProto.FLOAT, ("batch", 8, "4*height", "4*width")),
}
OUTPUTS: Mapping[str, tuple[int, Sizes]] = {
    "out_sample": (TensorProto.FLOAT, ("batch", 4, "8*height", "8*width"))
}
WEIGHTS: Mapping[str, tuple[int, Sizes]] = {
    "lora_scale": (TensorProto.FLOAT, ("batch", "rank")),
    "attn.to_q.lora_down": (TensorProto.FLOAT, ("rank", 32)),
    "attn.to_q.lora_up": (TensorProto.FLOAT, (32, "rank")),
}


def graph_file(
    folder: Path,
    inputs: Mapping[str, tuple[int, Sizes]] = INPUTS,
    outputs: Mapping[str, tuple[int, Sizes]] = OUTPUTS,
) -> Path:
    """An ONNX file of these inputs and outputs, between which nothing happens."""

    def values(tensors: Mapping[str, tuple[int, Sizes]]) -> list[Any]:
        return [helper.make_tensor_value_info(name, *it) for name, it in tensors.items()]

    constant = helper.make_tensor("constant", TensorProto.FLOAT, [1], [1.0])
    graph = helper.make_graph(
        [],
        "network",
        # Old exporters list what is constant among the inputs too.
        [*values(inputs), *values({"constant": (TensorProto.FLOAT, (1,))})],
        values(outputs),
        [constant],
    )
    path = folder / "model.onnx"
    onnx.save(helper.make_model(graph), path)
    return path


@pytest.mark.parametrize("options", ALL_OPTIONS.values(), ids=ALL_OPTIONS)
def test_a_config_that_agrees_with_its_graph_passes(tmp_path: Path, options: Options) -> None:
    check_config(made(options), graph_file(tmp_path))


def without(name: str) -> dict[str, tuple[int, Sizes]]:
    return {key: it for key, it in INPUTS.items() if key != name}


@pytest.mark.parametrize("options", [PythonOptions(), OnnxRuntimeOptions()])
@pytest.mark.parametrize(
    ("inputs", "outputs", "message"),
    [
        (
            {**INPUTS, "sample": (TensorProto.FLOAT16, INPUTS["sample"][1])},
            OUTPUTS,
            "input sample: config.pbtxt has TYPE_FP32, the graph has TYPE_FP16",
        ),
        (
            {**INPUTS, "sample": (TensorProto.UINT8, INPUTS["sample"][1])},
            OUTPUTS,
            "input sample: config.pbtxt has TYPE_FP32, the graph has UINT8",
        ),
        (
            {**INPUTS, "timestep": (TensorProto.FLOAT, ("batch", 1))},
            OUTPUTS,
            r"input timestep: config.pbtxt has \[-1\], the graph has \[-1, 1\]",
        ),
        (
            {**INPUTS, "encoder_hidden_states": (TensorProto.FLOAT, ("batch", "sequence", 64))},
            OUTPUTS,
            (
                r"input encoder_hidden_states: config.pbtxt has \[-1, -1, 96\], the graph has "
                r"\[-1, -1, 64\]"
            ),
        ),
        (
            {**INPUTS, "encoder_hidden_states": (TensorProto.FLOAT, ("batch", 77, 96))},
            OUTPUTS,
            (
                r"input encoder_hidden_states: config.pbtxt has \[-1, -1, 96\], the graph has "
                r"\[-1, 77, 96\]"
            ),
        ),
        (
            {**INPUTS, "sample": (TensorProto.FLOAT, (2, 4, "8*height", "8*width"))},
            OUTPUTS,
            (
                r"input sample: config.pbtxt has batches, the graph has \[2, 4, -1, -1\], whose "
                "first size is not dynamic"
            ),
        ),
        (
            {**INPUTS, "timestep": (TensorProto.FLOAT, ())},
            OUTPUTS,
            (
                r"input timestep: config.pbtxt has batches, the graph has \[\], whose first size "
                "is not dynamic"
            ),
        ),
        (
            without("timestep"),
            OUTPUTS,
            (
                "input timestep: config.pbtxt has it, the graph has sample, encoder_hidden_states, "
                "mid_block_res_sample"
            ),
        ),
        (
            {**INPUTS, "time_ids": (TensorProto.FLOAT, ("batch", 6))},
            OUTPUTS,
            (
                "input time_ids: the graph has it, config.pbtxt has encoder_hidden_states, "
                "mid_block_res_sample, sample, timestep"
            ),
        ),
        (
            {**INPUTS, **WEIGHTS},
            OUTPUTS,
            "input lora_scale: the graph has it, config.pbtxt has .*",
        ),
        (
            INPUTS,
            {"out": OUTPUTS["out_sample"]},
            "output out_sample: config.pbtxt has it, the graph has out",
        ),
        (
            INPUTS,
            {"out_sample": (TensorProto.FLOAT, ("batch", 4, 64, 64))},
            (
                r"output out_sample: config.pbtxt has \[-1, 4, -1, -1\], the graph has "
                r"\[-1, 4, 64, 64\]"
            ),
        ),
        (
            INPUTS,
            {**OUTPUTS, "features": (TensorProto.FLOAT, ("batch", 3))},
            "output features: the graph has it, config.pbtxt has out_sample",
        ),
    ],
)
def test_a_mismatch_is_named(
    tmp_path: Path,
    options: Options,
    inputs: Mapping[str, tuple[int, Sizes]],
    outputs: Mapping[str, tuple[int, Sizes]],
    message: str,
) -> None:
    path = graph_file(tmp_path, inputs, outputs)

    with pytest.raises(ExportError, match=f"^unet: {message}$"):
        check_config(made(options), path)


def test_a_network_without_batches_is_named(tmp_path: Path) -> None:
    config = made(PythonOptions(), replace(UNET, max_batch_size=0))

    with pytest.raises(ExportError, match=r"^unet: max_batch_size: 0 allows no batches, the graph"):
        check_config(config, graph_file(tmp_path))


@pytest.mark.parametrize("options", [PythonOptions(), TorchOptions()])
def test_weights_of_adapters_are_no_inputs_of_a_call(tmp_path: Path, options: Options) -> None:
    check_config(made(options, ADAPTABLE), graph_file(tmp_path, {**INPUTS, **WEIGHTS}))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"attn.to_q.lora_down": (TensorProto.FLOAT, ("batch", "rank", 32))},
            (
                r"attn.to_q.lora_down: adapters are TYPE_FP32 of \(rank, in\), the graph has "
                r"TYPE_FP32 of \[-1, -1, 32\]"
            ),
        ),
        (
            {"attn.to_q.lora_down": (TensorProto.FLOAT, (4, 32))},
            (
                r"attn.to_q.lora_down: adapters are TYPE_FP32 of \(rank, in\), the graph has "
                r"TYPE_FP32 of \[4, 32\]"
            ),
        ),
        (
            {"attn.to_q.lora_up": (TensorProto.FLOAT16, (32, "rank"))},
            (
                r"attn.to_q.lora_up: adapters are TYPE_FP32 of \(out, rank\), the graph has "
                r"TYPE_FP16 of \[32, -1\]"
            ),
        ),
    ],
)
def test_weights_that_no_adapter_fits_are_named(
    tmp_path: Path, changed: Mapping[str, tuple[int, Sizes]], message: str
) -> None:
    path = graph_file(tmp_path, {**INPUTS, **WEIGHTS, **changed})

    with pytest.raises(ExportError, match=f"^unet: {message}$"):
        check_config(made(PythonOptions(), ADAPTABLE), path)


def test_adapters_that_the_graph_has_no_weights_for_are_named(tmp_path: Path) -> None:
    path = graph_file(tmp_path, {**INPUTS, "lora_scale": WEIGHTS["lora_scale"]})

    with pytest.raises(ExportError, match=r"^unet: lora_scale: config.pbtxt has it, the graph has"):
        check_config(made(PythonOptions(), ADAPTABLE), path)


def test_a_graph_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    with pytest.raises(ExportError, match=r"model.onnx: FileNotFoundError"):
        check_config(made(PythonOptions()), path)
    path.write_bytes(b"no protobuf")
    with pytest.raises(ExportError, match=r"model.onnx: DecodeError"):
        check_config(made(PythonOptions()), path)


def test_only_what_our_own_runners_run_has_one_beside_it(tmp_path: Path) -> None:
    records = {str(it): {"backend": str(it), "max_batch_size": 63} for it in Backend}
    for name in records:
        (tmp_path / name / "1").mkdir(parents=True)
        (tmp_path / name / "1" / "model.py").write_text("of an older runner")
        (tmp_path / name / "1" / "helper_of_an_older_runner.py").touch()

    write_python_models(tmp_path, {"networks": records, "denoiser": {"network": "python"}})

    shared = {path.name for path in (templates() / "shared").glob("*.py")}
    for name in records:
        runner = {"python": "onnx_network", "torch": "torch_network"}.get(name)
        files = {path.name for path in (tmp_path / name / "1").iterdir()}
        assert files == ({"model.py", *shared} if runner else set())
        if runner:
            expected = (templates() / runner / "1" / "model.py").read_bytes()
            assert (tmp_path / name / "1" / "model.py").read_bytes() == expected
    assert (tmp_path / "stable_diffusion" / "1" / "darkroom_engine" / "fleet.py").is_file()


@pytest.mark.parametrize(("most", "expected"), [(63, "16"), (16, "16"), (8, "8")])
def test_the_engine_makes_no_larger_calls_than_the_denoiser_was_built_for(
    tmp_path: Path, most: int, expected: str
) -> None:
    (tmp_path / "unet" / "1").mkdir(parents=True)
    record = {"backend": "tensorrt", "max_batch_size": most}

    write_python_models(tmp_path, {"networks": {"unet": record}, "denoiser": {"network": "unet"}})

    config = read_config(tmp_path / "stable_diffusion")
    assert config.parameters["max_rows"].string_value == expected


def test_every_backend_has_a_file() -> None:
    assert set(MODEL_FILES) == set(Backend)
