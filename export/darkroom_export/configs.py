"""Triton's descriptions of the networks: one config.pbtxt a network, for each backend that runs it.

All are made from one `Description`, which an export makes of a `NetworkSpec`, and which is read
back from the config that an exported repository has: what changes a repository's backend needs no
PyTorch module. Field names are those of Triton's `model_config.proto`; keys of parameters are those
of its backends, github.com/triton-inference-server/onnxruntime_backend and tensorrt_backend.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from darkroom_export.backend import Backend
from darkroom_export.errors import ExportError, first_line
from darkroom_export.lora_inputs import LORA_SCALE, WeightSpec
from darkroom_export.networks import MAX_BATCH_SIZE, NetworkSpec, TensorSpec

CONFIG = "config.pbtxt"
MODEL_FILES = {
    Backend.PYTHON: "model.onnx",
    Backend.ONNXRUNTIME: "model.onnx",
    Backend.TENSORRT: "model.plan",
    Backend.TORCH: "model.pt2",
}
"""What each backend runs, in the folder of a network's version."""
OPTIONAL_INPUTS = "optional_inputs"
_FULL_BATCH_SIZE = "full_batch_size"
_KEPT = (OPTIONAL_INPUTS, "lora_names", "disabled_optimizers")
"""Parameters that only our own runners read. Others leave them alone, so that they are not lost."""
_DTYPES = {torch.float32: "TYPE_FP32", torch.int64: "TYPE_INT64"}
_ACCELERATORS = ("cuda", "tensorrt")
_CUDA_KEYS_OF_THE_MODEL = (
    *("cudnn_conv_algo_search", "gpu_mem_limit"),
    *("arena_extend_strategy", "do_copy_in_default_stream"),
)
"""Settings of CUDA that the backend reads from the model's parameters. It sets them to its own
defaults where they are not there, whatever the accelerator's parameters say."""
_CUDA_DEFAULTS = {"cudnn_conv_algo_search": "1"}
"""Heuristic: the backend's default tries every algorithm at every new shape, of which there are as
many here as numbers of rows."""

_Config = model_config_pb2.ModelConfig
_Group = model_config_pb2.ModelInstanceGroup


class ShapeRange(Protocol):
    """What an input may measure in one optimisation profile, the batch first."""

    @property
    def min(self) -> Sequence[int]: ...
    @property
    def opt(self) -> Sequence[int]:
        """What it mostly measures."""
        ...

    @property
    def max(self) -> Sequence[int]: ...


Profile = Mapping[str, ShapeRange]
"""The ranges of all inputs of a network, by name, as Polygraphy's `Profile` has them."""


@dataclass(frozen=True)
class Tensor:
    """An input or output as Triton sees it, without its batch dimension."""

    name: str
    data_type: str
    """Triton's name of it, such as TYPE_FP32."""
    dims: tuple[int, ...]
    """-1 where it is dynamic; () is one number a row."""
    is_optional: bool = False


@dataclass(frozen=True)
class Description:
    """What all configs of a network have in common."""

    name: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    max_batch_size: int
    parameters: Mapping[str, str] = field(default_factory=dict)
    """What our own runners are told: which inputs they fill in, and the names of the adapters."""

    @classmethod
    def from_spec(cls, spec: NetworkSpec) -> "Description":
        # An empty record is of an input that the runner knows by its name.
        optional = {tensor.name: dict(tensor.optional) for tensor in spec.inputs if tensor.optional}
        return cls(
            name=spec.name,
            inputs=tuple(map(_tensor_of, served_inputs(spec))),
            outputs=tuple(map(_tensor_of, spec.outputs)),
            max_batch_size=MAX_BATCH_SIZE,
            parameters={OPTIONAL_INPUTS: json.dumps(optional)} if optional else {},
        )

    @classmethod
    def from_config(cls, config: model_config_pb2.ModelConfig) -> "Description":
        """Read it back from a config of any backend."""
        parameters = {
            key: config.parameters[key].string_value for key in _KEPT if key in config.parameters
        }
        # Backends of Triton's own have no optional inputs, ours may have them again.
        filled = json.loads(parameters.get(OPTIONAL_INPUTS, "{}"))
        return cls(
            name=config.name,
            inputs=tuple(
                Tensor(*_described(entry), is_optional=entry.optional or entry.name in filled)
                for entry in config.input
            ),
            outputs=tuple(Tensor(*_described(entry)) for entry in config.output),
            max_batch_size=_full_batch_size(config),
            parameters=parameters,
        )


@dataclass(frozen=True)
class PythonOptions:
    """ONNX Runtime in a Triton Python model of ours, on the CPU."""

    backend: ClassVar[Backend] = Backend.PYTHON
    intra_op_thread_count: int = 0
    """0 takes all cores."""


@dataclass(frozen=True)
class OnnxRuntimeOptions:
    """Triton's own ONNX Runtime backend."""

    backend: ClassVar[Backend] = Backend.ONNXRUNTIME
    is_on_gpu: bool = True
    gpus: tuple[int, ...] = ()
    """Those that have an instance each; () is all that the server sees."""
    accelerator: str = "cuda"
    """What computes on a GPU: `cuda`, or `tensorrt` in engines built when the model is loaded."""
    accelerator_parameters: Mapping[str, str] = field(default_factory=dict)
    """Further settings of the accelerator, by the backend's own keys, which the server checks."""
    profile: Profile | None = None
    """For tensorrt, which shapes its engines are for; None leaves that to the first calls."""
    engine_cache: str = ""
    """For tensorrt, the folder in which the server keeps its engines; "" keeps none."""
    is_half: bool = False
    """For tensorrt, whether it may compute in half precision: a graph of that precision needs it
    too."""
    intra_op_thread_count: int = 0
    inter_op_thread_count: int = 0


@dataclass(frozen=True)
class TensorRtOptions:
    """Triton's own TensorRT backend."""

    backend: ClassVar[Backend] = Backend.TENSORRT
    profiles: Sequence[Profile]
    """Those of the engine, in its order. Every instance takes all of them."""
    gpus: tuple[int, ...] = ()
    graph_batches: Sequence[int] = ()
    """Batch sizes to capture CUDA graphs of, each at what every profile is best at; a batch in
    between takes the next larger one's. () captures none."""
    copies_output_beside: bool = True
    """Whether outputs are copied while another caller's call computes; inputs and outputs take
    their memory twice then."""
    busy_wait: bool = True
    """Whether a core waits for the GPU without sleeping, which shortens every call."""


@dataclass(frozen=True)
class TorchOptions:
    """A PyTorch program in a Triton Python model of ours."""

    backend: ClassVar[Backend] = Backend.TORCH
    device: str = "auto"
    """auto, cpu, cuda or cuda:N; auto is a GPU where there is one."""
    gpus: tuple[int, ...] = ()
    parameters: Mapping[str, str] = field(default_factory=dict)
    """The runner's settings, in place of its own defaults."""


Options = PythonOptions | OnnxRuntimeOptions | TensorRtOptions | TorchOptions
DEFAULT_OPTIONS = PythonOptions()


def native_config(
    description: Description, options: Options = DEFAULT_OPTIONS
) -> model_config_pb2.ModelConfig:
    """The config.pbtxt of a network, for the backend that the options are of.

    A TensorRT engine takes no larger batches than its profiles, and the config says so:
    `max_batch_size` may be below the description's.

    Raises:
        ExportError: the backend cannot run this network, or an option is none.
    """
    if isinstance(options, PythonOptions):
        return _python_config(description, options)
    if isinstance(options, TorchOptions):
        return _torch_config(description, options)
    if any(tensor.name == LORA_SCALE for tensor in description.inputs):
        raise ExportError(
            f"{description.name}: takes LoRA adapters, whose weights are no part of a call; only "
            f"the backends {Backend.PYTHON} and {Backend.TORCH} hold them"
        )
    if isinstance(options, TensorRtOptions):
        return _tensorrt_config(description, options)
    return _onnxruntime_config(description, options)


def config_text(config: model_config_pb2.ModelConfig) -> str:
    """What config.pbtxt holds."""
    return str(text_format.MessageToString(config))


def read_config(model: Path) -> model_config_pb2.ModelConfig:
    """The config.pbtxt in a model's folder.

    Raises:
        ExportError: it cannot be read, or has a field that Triton's schema has not.
    """
    path = model / CONFIG
    try:
        return text_format.Parse(path.read_text(), _Config())
    except (OSError, UnicodeError, text_format.ParseError) as error:
        raise ExportError(f"{path}: {first_line(error)}") from None


def served_inputs(spec: NetworkSpec) -> list[TensorSpec]:
    """Those that Triton sees: weights of adapters are read by what runs the graph."""
    return [tensor for tensor in spec.inputs if not isinstance(tensor, WeightSpec)]


def _python_config(
    description: Description, options: PythonOptions
) -> model_config_pb2.ModelConfig:
    config = _common(description, "python", with_optional=True)
    config.instance_group.add(kind=_Group.KIND_CPU, count=1)
    # The name is the ONNX Runtime backend's.
    _set(config, intra_op_thread_count=options.intra_op_thread_count)
    return config


def _torch_config(description: Description, options: TorchOptions) -> model_config_pb2.ModelConfig:
    config = _common(description, "python", with_optional=True)
    kind, _, index = options.device.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (index and not index.isdecimal()):
        raise ExportError(
            f"device: {options.device!r} is none, allowed are auto, cpu, cuda, cuda:N"
        )
    if kind == "cpu":
        config.instance_group.add(kind=_Group.KIND_CPU, count=1)
    else:
        gpus = (int(index),) if index else options.gpus
        # KIND_AUTO is a GPU where there is one.
        config.instance_group.add(
            kind=_Group.KIND_GPU if kind == "cuda" else _Group.KIND_AUTO, count=1, gpus=gpus
        )
    _set(config, device=options.device, **options.parameters)
    return config


def _onnxruntime_config(
    description: Description, options: OnnxRuntimeOptions
) -> model_config_pb2.ModelConfig:
    config = _common(description, "onnxruntime")
    config.default_model_filename = MODEL_FILES[Backend.ONNXRUNTIME]
    _set(
        config,
        intra_op_thread_count=options.intra_op_thread_count,
        inter_op_thread_count=options.inter_op_thread_count,
    )
    if not options.is_on_gpu:
        config.instance_group.add(kind=_Group.KIND_CPU, count=1)
        return config
    config.instance_group.add(kind=_Group.KIND_GPU, count=1, gpus=options.gpus)
    if options.accelerator not in _ACCELERATORS:
        raise ExportError(
            f"accelerator: {options.accelerator!r} is none, allowed are {', '.join(_ACCELERATORS)}"
        )
    accelerators = config.optimization.execution_accelerators
    accelerator = accelerators.gpu_execution_accelerator.add(name=options.accelerator)
    if options.accelerator == "tensorrt":
        _accelerate_by_tensorrt(config, accelerator.parameters, description, options)
    for key, value in (_CUDA_DEFAULTS | dict(options.accelerator_parameters)).items():
        if key in _CUDA_KEYS_OF_THE_MODEL:
            _set(config, **{key: value})
        else:
            accelerator.parameters[key] = value
    return config


def _accelerate_by_tensorrt(
    config: Any, parameters: Any, description: Description, options: OnnxRuntimeOptions
) -> None:
    parameters["precision_mode"] = "FP16" if options.is_half else "FP32"
    if options.engine_cache:
        parameters["trt_engine_cache_enable"] = "1"
        parameters["trt_engine_cache_path"] = options.engine_cache
    if options.profile is not None:
        _limit_batch(config, _max_batch(description, options.profile))
        for end in ("min", "opt", "max"):
            shapes = ((name, getattr(size, end)) for name, size in options.profile.items())
            parameters[f"trt_profile_{end}_shapes"] = ",".join(
                f"{name}:{'x'.join(map(str, shape))}" for name, shape in shapes
            )


def _tensorrt_config(
    description: Description, options: TensorRtOptions
) -> model_config_pb2.ModelConfig:
    config = _common(description, "tensorrt")
    config.default_model_filename = MODEL_FILES[Backend.TENSORRT]
    if not options.profiles:
        raise ExportError(f"{description.name}: an engine has one profile at least")
    _limit_batch(config, max(_max_batch(description, profile) for profile in options.profiles))
    # A request goes to any free instance, so that each has to know all shapes.
    profiles = [str(index) for index in range(len(options.profiles))]
    config.instance_group.add(kind=_Group.KIND_GPU, count=1, gpus=options.gpus, profile=profiles)
    cuda = config.optimization.cuda
    cuda.busy_wait_events = options.busy_wait
    cuda.output_copy_stream = options.copies_output_beside
    if options.graph_batches:
        cuda.graphs = True
        for graph in _graphs(options, config.max_batch_size):
            _add_graph(cuda, graph)
    return config


@dataclass(frozen=True)
class _Graph:
    """A CUDA graph: the batch it is captured at, the smallest that takes it, and its shapes."""

    batch: int
    smallest: int
    dims: tuple[tuple[str, tuple[int, ...]], ...]


def _graphs(options: TensorRtOptions, max_batch_size: int) -> Iterator[_Graph]:
    """Those of every profile, each shape once: Triton captures each in all profiles that take it.

    Only batches are rounded up. The rows beyond those of a call hold what an earlier one left
    there, which no other row sees; a larger picture would be another picture.
    """
    batches = sorted({batch for batch in options.graph_batches if batch <= max_batch_size})
    if not batches or batches[0] < 1:
        raise ExportError(
            f"graph_batches: {tuple(options.graph_batches)} has none of 1 to {max_batch_size}"
        )
    known = set()
    for profile in options.profiles:
        dims = tuple((name, tuple(size.opt[1:])) for name, size in profile.items())
        first = next(iter(profile.values()))
        taken = [batch for batch in batches if first.min[0] <= batch <= first.max[0]]
        for before, batch in pairwise([first.min[0] - 1, *taken]):
            graph = _Graph(batch, before + 1, dims)
            if graph not in known:
                known.add(graph)
                yield graph


def _add_graph(cuda: Any, graph: _Graph) -> None:
    spec = cuda.graph_spec.add(batch_size=graph.batch)
    spec.graph_lower_bound.batch_size = graph.smallest
    for name, dims in graph.dims:
        # An empty shape has to be there too: it is of an input of one number a row.
        spec.input[name].dim.extend(dims)
        spec.graph_lower_bound.input[name].dim.extend(dims)


def _max_batch(description: Description, profile: Profile) -> int:
    """The largest batch of a profile, which fits the network."""
    name = description.name
    given, known = set(profile), {tensor.name for tensor in description.inputs}
    if given != known:
        raise ExportError(
            f"{name}: the profile has the inputs {_listed(given)}, the network has {_listed(known)}"
        )
    batches = {size.max[0] for size in profile.values()}
    if len(batches) != 1:
        raise ExportError(f"{name}: the profile's inputs have different batches, {sorted(batches)}")
    for tensor in description.inputs:
        size = profile[tensor.name]
        for end, shape in (("min", size.min), ("opt", size.opt), ("max", size.max)):
            if not _takes(tensor, tuple(shape)):
                raise ExportError(
                    f"{name}: {tensor.name}: the profile's {end} is {tuple(shape)}, the network "
                    f"takes {('batch', *tensor.dims)}"
                )
    return int(batches.pop())


def _limit_batch(config: Any, largest: int) -> None:
    """Let the config take batches up to the largest, and remember what the network takes."""
    if largest < config.max_batch_size:
        _set(config, **{_FULL_BATCH_SIZE: config.max_batch_size})
        config.max_batch_size = largest


def _full_batch_size(config: Any) -> int:
    kept = config.parameters.get(_FULL_BATCH_SIZE)
    return int(kept.string_value) if kept else int(config.max_batch_size)


def _takes(tensor: Tensor, shape: tuple[int, ...]) -> bool:
    sizes = shape[1:]
    return len(sizes) == len(tensor.dims) and all(
        dim in (-1, size) for dim, size in zip(tensor.dims, sizes, strict=True)
    )


def _common(
    description: Description, backend: str, *, with_optional: bool = False
) -> model_config_pb2.ModelConfig:
    """What does not depend on how the network is run.

    No backend of Triton's own takes a batch of which an input is left out.
    """
    config = _Config(
        name=description.name, backend=backend, max_batch_size=description.max_batch_size
    )
    for tensor in description.inputs:
        _describe(config.input.add(optional=with_optional and tensor.is_optional), tensor)
    for tensor in description.outputs:
        _describe(config.output.add(), tensor)
    _set(config, **description.parameters)
    return config


def _set(config: Any, **parameters: object) -> None:
    for key, value in parameters.items():
        config.parameters[key].string_value = str(value)


def _describe(entry: Any, tensor: Tensor) -> None:
    entry.name = tensor.name
    entry.data_type = model_config_pb2.DataType.Value(tensor.data_type)
    if tensor.dims:
        entry.dims.extend(tensor.dims)
    else:
        # Triton wants a dimension besides the batch; the network is to see none.
        entry.dims.append(1)
        entry.reshape.SetInParent()


def _described(entry: Any) -> tuple[str, str, tuple[int, ...]]:
    """The name, the type and the dimensions that the network sees."""
    dims = entry.reshape.shape if entry.HasField("reshape") else entry.dims
    return entry.name, model_config_pb2.DataType.Name(entry.data_type), tuple(dims)


def _tensor_of(spec: TensorSpec) -> Tensor:
    dims = tuple(size if isinstance(size, int) else -1 for size in spec.shape)
    return Tensor(spec.name, _DTYPES[spec.dtype], dims, is_optional=spec.optional is not None)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"
