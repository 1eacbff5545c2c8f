"""Runs the ONNX network that lies beside this file, on ONNX Runtime."""

# The stub adds to pb_utils after this file is imported, so that annotations must wait.
from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils

LORA_SCALE = "lora_scale"
MAX_STACKS = 4
"""How many sets of adapters are kept as the graph takes them."""


class TritonPythonModel:
    """Any network whose inputs and outputs are named in its config.pbtxt as in its graph.

    The config's parameters say what it fills in itself: `optional_inputs`, zeros where a request
    leaves them out, and `lora_names`, the adapters in the order of the columns of `lora_scale`.
    """

    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        parameters = {
            key: value.get("string_value", "") for key, value in config["parameters"].items()
        }
        self._inputs = [entry for entry in config["input"] if entry["name"] != LORA_SCALE]
        self._outputs = [entry["name"] for entry in config["output"]]
        self._fillers = json.loads(parameters.get("optional_inputs", "{}"))
        folder = Path(args["model_repository"]) / args["model_version"]
        self._session = _open(folder / "model.onnx", parameters)
        shapes = {entry.name: entry.shape for entry in self._session.get_inputs()}
        names = json.loads(parameters.get("lora_names", "[]"))
        self._adapters = _Adapters(folder / "adapters", names, shapes)

    def execute(self, requests: list) -> list:
        return [self._run(request) for request in requests]

    def _run(self, request: pb_utils.InferenceRequest) -> pb_utils.InferenceResponse:
        # Triton lists all of them for a request that lists none.
        wanted = request.requested_output_names() or self._outputs
        try:
            arrays = self._session.run(wanted, self._feed(request))
        except Exception as error:  # noqa: BLE001  whatever it is, it is the answer
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error)))
        return pb_utils.InferenceResponse(
            [pb_utils.Tensor(name, array) for name, array in zip(wanted, arrays, strict=True)]
        )

    def _feed(self, request: pb_utils.InferenceRequest) -> dict[str, np.ndarray]:
        feed = {}
        for entry in self._inputs:
            array = _read(request, entry["name"])
            if array is not None:
                # `reshape { }` in the config: the graph sees the batch dimension alone.
                feed[entry["name"]] = array.reshape(-1) if "reshape" in entry else array
            elif entry["name"] not in self._fillers:
                raise ValueError(f"{entry['name']}: is missing")
        for name, filler in self._fillers.items():
            if name not in feed:
                batch, _, height, width = feed[filler["like"]].shape
                divisor = filler["divisor"]
                size = (batch, filler["channels"], height // divisor, width // divisor)
                feed[name] = np.zeros(size, np.float32)
        batch = len(feed[self._inputs[0]["name"]])
        return feed | self._adapters.feed(_read(request, LORA_SCALE), batch)


class _Adapters:
    """The LoRA adapters of a graph that takes their weights as inputs; of another graph, none."""

    def __init__(self, folder: Path, names: list[str], inputs: dict[str, list]) -> None:
        """Load the adapters.

        Args:
            inputs: the shapes of the graph's inputs, by name.
        """
        downs = [name for name in inputs if name.endswith(".lora_down")]
        layers = [name.removesuffix(".lora_down") for name in downs]
        self._widths = {
            layer: (inputs[f"{layer}.lora_down"][1], inputs[f"{layer}.lora_up"][0])
            for layer in layers
        }
        self._adapters = [self._load(folder / f"{name}.safetensors") for name in names]
        self._ranks = [len(adapter[downs[0]]) for adapter in self._adapters]
        # A graph has no input of size 0: one component that nobody uses.
        self._none = self._zeros(1)
        self._stacks: OrderedDict[tuple[int, ...], dict[str, np.ndarray]] = OrderedDict()

    def feed(self, scale: np.ndarray | None, batch: int) -> dict[str, np.ndarray]:
        """The graph's inputs for rows of which each takes its own share of every adapter.

        Args:
            scale: (batch, number of adapters), or None where no row uses any.
        """
        if scale is not None and scale.shape != (batch, len(self._adapters)):
            raise ValueError(
                f"{LORA_SCALE}: has shape {scale.shape}, for {batch} rows and "
                f"{len(self._adapters)} adapters"
            )
        if not self._widths:
            return {}
        used = () if scale is None else tuple(np.flatnonzero(scale.any(axis=0)).tolist())
        if not used:
            return {LORA_SCALE: np.zeros((batch, 1), np.float32), **self._none}
        ranks = [self._ranks[column] for column in used]
        return {LORA_SCALE: np.repeat(scale[:, used], ranks, axis=1), **self._stack(used)}

    def _stack(self, used: tuple[int, ...]) -> dict[str, np.ndarray]:
        """The adapters side by side, along their ranks."""
        if len(used) == 1:
            return self._adapters[used[0]]
        if used not in self._stacks:
            self._stacks[used] = {
                name: np.concatenate(
                    [self._adapters[column][name] for column in used],
                    axis=0 if name.endswith(".lora_down") else 1,
                )
                for name in self._none
            }
        self._stacks.move_to_end(used)
        if len(self._stacks) > MAX_STACKS:
            self._stacks.popitem(last=False)
        return self._stacks[used]

    def _load(self, path: Path) -> dict[str, np.ndarray]:
        """An adapter as inputs of the graph; layers that it leaves alone are zeros."""
        # Only networks with adapters need the package.
        from safetensors.numpy import load_file  # noqa: PLC0415

        tensors = load_file(path)
        rank = next((len(array) for key, array in tensors.items() if key.endswith(".down")), 0)
        adapter = self._zeros(rank)
        for key, array in tensors.items():
            layer, _, part = key.rpartition(".")
            name = f"{layer}.lora_{part}"
            if name not in adapter or adapter[name].shape != array.shape:
                raise ValueError(f"{path}: {key} of {array.shape} does not fit the graph")
            adapter[name] = np.ascontiguousarray(array, np.float32)
        return adapter

    def _zeros(self, rank: int) -> dict[str, np.ndarray]:
        adapter = {}
        for layer, (width_in, width_out) in self._widths.items():
            adapter[f"{layer}.lora_down"] = np.zeros((rank, width_in), np.float32)
            adapter[f"{layer}.lora_up"] = np.zeros((width_out, rank), np.float32)
        return adapter


def _open(path: Path, parameters: dict[str, str]) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = int(parameters["intra_op_thread_count"])
    # The networks take turns: threads that spin while idle would take the cores from whichever
    # network is running.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    disabled = parameters.get("disabled_optimizers", "")
    return onnxruntime.InferenceSession(
        str(path),
        sess_options=options,
        providers=["CPUExecutionProvider"],
        disabled_optimizers=[name.strip() for name in disabled.split(",") if name.strip()],
    )


def _read(request: pb_utils.InferenceRequest, name: str) -> np.ndarray | None:
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    return None if tensor is None else tensor.as_numpy()
