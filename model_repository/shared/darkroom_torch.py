"""Runs networks by PyTorch: programs of `torch.export`, on a GPU or on the CPU.

A file holds one program, and beside it `tensors.json`, the names of its inputs and outputs in their
order. Weights of LoRA adapters are inputs too, which are filled in here. An export copies this file
beside each model.py.
"""

from __future__ import annotations

import json
import threading
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

from darkroom_inputs import DOWN, LORA_SCALE, UP, Adapters, Array, Fillers, Shape, left_out
from darkroom_settings import TorchSettings

try:
    import torch
    from torch import nn
    from torch.export.passes import move_to_device_pass
except ModuleNotFoundError as error:
    raise ImportError(
        "the networks of this repository are PyTorch's, which is not installed for the Python that "
        f"the server runs: pip install 'torch>=2.9' ({error})"
    ) from error

PROGRAM = "model.pt2"
TENSORS = "tensors.json"
"""The file within the program's that names its inputs and outputs."""
MAX_RECORDINGS = 64
"""Sizes of call of a network that are kept recorded; the one that was not used for longest goes."""
NUM_WARMUP_CALLS = 3
"""Before a recording: libraries choose their algorithms, and take their memory, at first calls."""

_LOADING = threading.Lock()
"""PyTorch loads one program at a time in a process, and fails at a second one."""

Outputs = tuple[torch.Tensor, ...]
Function = Callable[[], Outputs]


class Recording(Protocol):
    """A call of a function, to be made again on what its inputs then hold."""

    @property
    def outputs(self) -> Outputs:
        """Where `replay` leaves them: the same tensors always."""

    def replay(self) -> None: ...


Recorder = Callable[[Function], Recording]
"""Records calls of one network, whose replays never overlap."""


class CalledAgain:
    """The recording where there is nothing to record with: the function itself."""

    def __init__(self, function: Function) -> None:
        self._function = function
        self.outputs = function()

    def replay(self) -> None:
        for output, made in zip(self.outputs, self._function(), strict=True):
            output.copy_(made)


class CudaGraphs:
    """Records CUDA graphs, which all take their memory from one pool."""

    _is_free = threading.Lock()
    """PyTorch records one at a time in a process."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        # A pool is of use to the next recording only if that is on the same stream, and no other
        # network's: for each stream there are workspaces, which two replays at once would share.
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def __call__(self, function: Function) -> Recording:
        with self._is_free, torch.cuda.device(self._device):
            # Not on the stream of the recordings: a workspace that it had before is outside of the
            # pool, and may be given back while graphs still write to it, as when one of them goes.
            for _ in range(NUM_WARMUP_CALLS):
                function()
            graph = torch.cuda.CUDAGraph()
            # What other threads do meanwhile, as decoding, must not make this fail.
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                outputs = function()
            return _CudaGraph(graph, outputs)


class _CudaGraph(NamedTuple):
    graph: torch.cuda.CUDAGraph
    outputs: Outputs

    def replay(self) -> None:
        self.graph.replay()


class _Buffer:
    """An input of recorded calls, always at the same place."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self._shared: torch.Tensor | None = None
        """What it holds, of what many calls have in common."""

    def fill(self, rows: torch.Tensor) -> None:
        """Put rows in; what stands in the rows behind them is of no account."""
        self._shared = None
        self.tensor[: len(rows)].copy_(rows)

    def hold(self, shared: torch.Tensor) -> None:
        """Put in what is the same for all rows, mostly the same as at the last call."""
        if self._shared is not shared:
            self.tensor.copy_(shared)
            self._shared = shared


class _Recorded(NamedTuple):
    buffers: dict[str, _Buffer]
    recording: Recording


class _Input(NamedTuple):
    sizes: Shape
    """-1 where it is dynamic."""
    dtype: torch.dtype


class TorchNetwork:
    """One network. Any thread may call it; calls are made one after the other."""

    def __init__(
        self,
        path: Path,
        device: torch.device,
        settings: TorchSettings,
        *,
        recorder: Recorder | None,
        fillers: Fillers | None = None,
        lora_names: Sequence[str] = (),
    ) -> None:
        """Load a program, which may take minutes.

        Args:
            recorder: what records calls; without one, none are, and no rows are added.
            fillers: inputs that may be left out.
            lora_names: the files in the folder `adapters` beside the program, in the order of the
                columns of `lora_scale`.

        Raises:
            ValueError: the file is none of an export, or an adapter is one of another network.
        """
        self._device = device
        self._is_compiled = bool(settings.compile)
        with _LOADING:
            program, names = _load(path, device)
            self._call = _callable(program, device, is_compiled=self._is_compiled)
        self._inputs = dict(zip(names["inputs"], _inputs_of(program), strict=True))
        self._outputs: list[str] = names["outputs"]
        self._buckets = settings.row_buckets
        self._recorder = recorder
        self._fillers = {
            name: filler for name, filler in (fillers or {}).items() if name in self._inputs
        }
        self._adapters = Adapters(
            path.parent / "adapters",
            lora_names,
            {name: entry.sizes for name, entry in self._inputs.items()},
            place=lambda array: torch.from_numpy(array).to(device),
            join=torch.cat,
        )
        self._required = [
            name
            for name in self._inputs
            if name not in self._fillers and name != LORA_SCALE and not name.endswith((DOWN, UP))
        ]
        self._blanks: dict[Shape, torch.Tensor] = {}
        self._buffers: WeakValueDictionary[tuple[str, Shape], _Buffer] = WeakValueDictionary()
        self._recorded: OrderedDict[tuple[Shape, ...], _Recorded] = OrderedDict()
        self._lock = threading.Lock()
        self._turns = _Turns(device)

    @classmethod
    def open(
        cls,
        path: Path,
        device: torch.device,
        settings: TorchSettings,
        *,
        fillers: Fillers | None = None,
        lora_names: Sequence[str] = (),
    ) -> Self:
        """As the constructor, with the recorder that the device and the settings ask for."""
        is_recorded = device.type == "cuda" and settings.cuda_graphs
        recorder = CudaGraphs(device) if is_recorded else None
        return cls(
            path, device, settings, recorder=recorder, fillers=fillers, lora_names=lora_names
        )

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        """The outputs of those names, float32, of one call.

        If all inputs are numpy's, so are the outputs, which are waited for; on a GPU the call is
        made beside what others do there. Else they are tensors on the device, in their turn on the
        current stream, and nothing is waited for. `lora_scale` is numpy's in any case.

        Raises:
            ValueError: an input is missing, unknown, or does not fit the others.
            RuntimeError: PyTorch cannot do it.
        """
        is_hosted = all(isinstance(array, np.ndarray) for array in inputs.values())
        indices = [self._outputs.index(name) for name in outputs]
        with self._lock, torch.no_grad(), self._turns.next(is_beside=is_hosted):
            made = self._run(inputs, indices)
            return to_host(made) if is_hosted else made

    def _run(self, inputs: Mapping[str, Array], indices: Sequence[int]) -> list[torch.Tensor]:
        missing = [name for name in self._required if name not in inputs]
        if missing:
            raise ValueError(f"{', '.join(missing)}: is missing")
        num_rows = _num_rows(inputs)
        own, shared = self._adapters.shares(inputs.get(LORA_SCALE), num_rows)
        given = {name: array for name, array in inputs.items() if name != LORA_SCALE}
        rows = {name: self._placed(name, array) for name, array in {**given, **own}.items()}
        size = num_rows if self._recorder is None else self._bucket(num_rows)
        shapes = {name: (size, *tensor.shape[1:]) for name, tensor in rows.items()}
        blanks = left_out(self._fillers, shapes)
        shared = {**shared, **{name: self._blank(shape) for name, shape in blanks.items()}}
        if self._recorder is None:
            outputs = self._call_with({**rows, **shared})
            return [outputs[index].contiguous() for index in indices]
        shapes |= {name: tuple(tensor.shape) for name, tensor in shared.items()}
        recorded = self._recorded_for(shapes, self._recorder)
        for name, buffer in recorded.buffers.items():
            if name in rows:
                buffer.fill(rows[name])
            else:
                buffer.hold(shared[name])
        recorded.recording.replay()
        outputs = recorded.recording.outputs
        # Copies, because the next call leaves its outputs at the same place.
        return [_copy(outputs[index][:num_rows]) for index in indices]

    def _placed(self, name: str, array: Array) -> torch.Tensor:
        if name not in self._inputs:
            raise ValueError(f"{name}: no such input; there are {', '.join(self._required)}")
        return to_device(array, self._device).to(self._inputs[name].dtype)

    def _bucket(self, num_rows: int) -> int:
        index = bisect_left(self._buckets, num_rows)
        return self._buckets[index] if index < len(self._buckets) else num_rows

    def _blank(self, shape: Shape) -> torch.Tensor:
        """Zeros, the same tensor for all calls of a size."""
        if shape not in self._blanks:
            if len(self._blanks) >= MAX_RECORDINGS:
                self._blanks.clear()
            self._blanks[shape] = torch.zeros(shape, device=self._device)
        return self._blanks[shape]

    def _recorded_for(self, shapes: Mapping[str, Shape], record: Recorder) -> _Recorded:
        """The recording of a call whose inputs have these shapes."""
        key = tuple(shapes[name] for name in self._inputs)
        if key not in self._recorded:
            buffers = {name: self._buffer(name, shapes[name]) for name in self._inputs}
            tensors = {name: buffer.tensor for name, buffer in buffers.items()}
            self._recorded[key] = _Recorded(buffers, record(lambda: self._call_with(tensors)))
        self._recorded.move_to_end(key)
        if len(self._recorded) > MAX_RECORDINGS:
            self._recorded.popitem(last=False)
        return self._recorded[key]

    def _buffer(self, name: str, shape: Shape) -> _Buffer:
        """The same for all recordings with such an input: they are replayed one after the other."""
        buffer = self._buffers.get((name, shape))
        if buffer is None:
            dtype = self._inputs[name].dtype
            buffer = _Buffer(torch.zeros(shape, dtype=dtype, device=self._device))
            self._buffers[name, shape] = buffer
        return buffer

    def _call_with(self, tensors: Mapping[str, torch.Tensor]) -> Outputs:
        given = [tensors[name] for name in self._inputs]
        if self._is_compiled:
            for name in self._inputs:
                if not name.endswith((DOWN, UP)):
                    # One set of kernels for all numbers of rows.
                    torch._dynamo.maybe_mark_dynamic(tensors[name], 0)  # noqa: SLF001  its name
        outputs = self._call(*given)
        return (outputs,) if isinstance(outputs, torch.Tensor) else tuple(outputs)


class _Turns:
    """The order of a network's calls on a device, on whichever streams they are made."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            self._beside = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._is_over = torch.cuda.Event()  # type: ignore[no-untyped-call]

    @contextmanager
    def next(self, *, is_beside: bool) -> Iterator[None]:
        """For one call: on a stream of its own if it is made beside others, else on the current."""
        if self._device.type != "cuda":
            yield
            return
        stream = self._beside if is_beside else torch.cuda.current_stream(self._device)
        with torch.cuda.stream(stream):
            stream.wait_event(self._is_over)
            try:
                yield
            finally:
                self._is_over.record(stream)


def pick_device(name: str, number: int = 0) -> torch.device:
    """The device of a setting; `auto` and `cuda` are the GPU of this number.

    Raises:
        ValueError: there is no such GPU.
    """
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and not num_gpus):
        return torch.device("cpu")
    device = torch.device(name if ":" in name else f"cuda:{number}")
    if device.index >= num_gpus:
        raise ValueError(f"device: {str(device)!r} is not there, PyTorch sees {num_gpus} GPUs")
    return device


def to_device(array: Array, device: torch.device) -> torch.Tensor:
    """An array of numpy, or a tensor, on the device; nothing computed there is waited for."""
    if isinstance(array, torch.Tensor):
        return array
    # PyTorch warns of arrays that it must not write to, as if it would.
    tensor = torch.from_numpy(np.require(array, requirements=["C", "W"]))
    if device.type == "cuda":
        # What is not pinned is copied only when the device has done all before.
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def to_host(tensors: Sequence[torch.Tensor]) -> list[NDArray[Any]]:
    """Wait for tensors that are computed on the current stream."""
    fetched = [Fetched(tensor) for tensor in tensors]
    return [it.array() for it in fetched]


class Fetched:
    """A tensor on its way to the host, as it was when this was made; on the CPU it is there."""

    def __init__(self, tensor: torch.Tensor) -> None:
        is_there = tensor.device.type == "cpu"
        self._host = tensor
        self._is_copied = None
        if not is_there:
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._is_copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._is_copied.record(torch.cuda.current_stream(tensor.device))

    def array(self) -> NDArray[Any]:
        """Wait until it is there."""
        if self._is_copied is not None:
            self._is_copied.synchronize()
        made: NDArray[Any] = self._host.numpy()
        return made


def _num_rows(inputs: Mapping[str, Array]) -> int:
    first, *others = inputs.items()
    for name, array in others:
        if len(array) != len(first[1]):
            raise ValueError(f"{name}: has {len(array)} rows, {first[0]} has {len(first[1])}")
    return len(first[1])


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


def _load(path: Path, device: torch.device) -> tuple[torch.export.ExportedProgram, Any]:
    """A program on the device, and the names of its inputs and outputs."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    files = {TENSORS: ""}
    program = torch.export.load(path, extra_files=files)
    if not files[TENSORS]:
        raise ValueError(f"{path}: holds no {TENSORS}, it was not made by an export of Darkroom")
    names = json.loads(files[TENSORS])
    if device.type == "cuda":
        # Of the process, whose networks are all of one export, and verified so.
        torch.backends.cudnn.allow_tf32 = names["allow_tf32"]
    # Of the program too: it makes tensors on the device that it was exported on.
    return move_to_device_pass(program, str(device)), names


def _inputs_of(program: torch.export.ExportedProgram) -> list[_Input]:
    """In their order."""
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    examples = [nodes[name].meta["val"] for name in program.graph_signature.user_inputs]
    return [
        _Input(
            tuple(size if isinstance(size, int) else -1 for size in example.shape), example.dtype
        )
        for example in examples
    ]


def _callable(
    program: torch.export.ExportedProgram, device: torch.device, *, is_compiled: bool
) -> Callable[..., Any]:
    module = program.module()
    if device.type == "cuda":
        put_channels_last(module)
        # Calls on other streams are to find the weights in place.
        torch.cuda.synchronize(device)
    return torch.compile(module) if is_compiled else module


def put_channels_last(module: nn.Module) -> None:
    """Lay out the weights of convolutions as GPUs like them, and with them what they make."""
    for parameter in module.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
