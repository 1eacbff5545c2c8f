"""Whether a config.pbtxt describes the ONNX graph beside it."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from tritonclient.grpc import model_config_pb2

from darkroom_export.configs import Description, Tensor
from darkroom_export.errors import ExportError, first_line
from darkroom_export.lora_inputs import DOWN, LORA_SCALE, UP

_TYPES = {
    onnx.TensorProto.FLOAT: "TYPE_FP32",
    onnx.TensorProto.FLOAT16: "TYPE_FP16",
    onnx.TensorProto.BFLOAT16: "TYPE_BF16",
    onnx.TensorProto.DOUBLE: "TYPE_FP64",
    onnx.TensorProto.INT32: "TYPE_INT32",
    onnx.TensorProto.INT64: "TYPE_INT64",
    onnx.TensorProto.BOOL: "TYPE_BOOL",
}


def check_config(config: model_config_pb2.ModelConfig, onnx_path: Path) -> None:
    """Compare a config with the graph that it describes, whichever backend is to run it.

    Raises:
        ExportError: names the tensor, what the config says, and what the graph says; or the graph
            cannot be read.
    """
    try:
        graph = onnx.load(onnx_path, load_external_data=False).graph
    except Exception as error:  # noqa: BLE001  protobuf's and the system's
        raise ExportError(f"{onnx_path}: {first_line(error)}") from None
    description = Description.from_config(config)
    problem = next(_problems(description, config.backend, graph), None)
    if problem:
        raise ExportError(f"{config.name}: {problem}")


@dataclass(frozen=True)
class _Value:
    """An input or output of a graph."""

    name: str
    data_type: str
    sizes: tuple[int, ...]
    """-1 where it is dynamic, the batch first."""


def _problems(description: Description, backend: str, graph: Any) -> Iterator[str]:
    """What the config and the graph disagree about, each a sentence."""
    if description.max_batch_size < 1:
        yield f"max_batch_size: {description.max_batch_size} allows no batches, the graph has them"
    initializers = {tensor.name for tensor in graph.initializer}
    inputs = {it.name: it for it in map(_value, graph.input) if it.name not in initializers}
    weights = {name for name in inputs if name.endswith((DOWN, UP))}
    has_adapters = any(tensor.name == LORA_SCALE for tensor in description.inputs)
    # Weights are held by what runs the graph, if it is one of ours and told so.
    if backend == "python" and has_adapters:
        yield from _weight_problems([inputs.pop(name) for name in sorted(weights)])
    yield from _tensor_problems("input", description.inputs, inputs)
    outputs = {it.name: it for it in map(_value, graph.output)}
    yield from _tensor_problems("output", description.outputs, outputs)


def _weight_problems(weights: list[_Value]) -> Iterator[str]:
    if not weights:
        yield f"{LORA_SCALE}: config.pbtxt has it, the graph has no weights of adapters"
    for weight in weights:
        # (rank, in) and (out, rank): no batch, and adapters of any rank.
        rank = 0 if weight.name.endswith(DOWN) else 1
        is_dynamic = [size == -1 for size in weight.sizes]
        if weight.data_type != "TYPE_FP32" or is_dynamic != [rank == 0, rank == 1]:
            expected = "(rank, in)" if rank == 0 else "(out, rank)"
            yield (
                f"{weight.name}: adapters are TYPE_FP32 of {expected}, the graph has "
                f"{weight.data_type} of {_shown(weight.sizes)}"
            )


def _tensor_problems(
    kind: str, tensors: tuple[Tensor, ...], values: dict[str, _Value]
) -> Iterator[str]:
    for tensor in tensors:
        value = values.get(tensor.name)
        if value is None:
            yield (
                f"{kind} {tensor.name}: config.pbtxt has it, the graph has "
                f"{', '.join(values) or 'none'}"
            )
            continue
        if tensor.data_type != value.data_type:
            yield (
                f"{kind} {tensor.name}: config.pbtxt has {tensor.data_type}, the graph has "
                f"{value.data_type}"
            )
        if value.sizes[:1] != (-1,):
            yield (
                f"{kind} {tensor.name}: config.pbtxt has batches, the graph has "
                f"{_shown(value.sizes)}, whose first size is not dynamic"
            )
        elif tensor.dims != value.sizes[1:]:
            yield (
                f"{kind} {tensor.name}: config.pbtxt has {_shown((-1, *tensor.dims))}, the graph "
                f"has {_shown(value.sizes)}"
            )
    known = {tensor.name for tensor in tensors}
    for name in values:
        if name not in known:
            yield f"{kind} {name}: the graph has it, config.pbtxt has {', '.join(sorted(known))}"


def _value(value: Any) -> _Value:
    tensor = value.type.tensor_type
    sizes = tuple(size.dim_value if size.HasField("dim_value") else -1 for size in tensor.shape.dim)
    number = tensor.elem_type
    name = _TYPES.get(number) or onnx.TensorProto.DataType.Name(number)
    return _Value(value.name, name, sizes)


def _shown(sizes: tuple[int, ...]) -> str:
    return f"[{', '.join(map(str, sizes))}]"
