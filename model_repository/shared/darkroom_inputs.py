"""What the runner of a network is asked, and what it fills in itself.

Left out may be inputs that are then zeros, and the weights of LoRA adapters always are: they lie
beside the network, and never leave the process that runs it. An export copies this file beside each
model.py.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = Any
"""numpy's, or a tensor of the library that runs the network."""
Shape = tuple[int, ...]
Fillers = Mapping[str, Mapping[str, Any]]
"""By the names of inputs that may be left out: of what shape their zeros are, see `left_out`."""

LORA_SCALE = "lora_scale"
DOWN, UP = ".lora_down", ".lora_up"
"""How the inputs end that take a layer's share of the adapters."""
MAX_STACKS = 4
"""How many sets of adapters are kept as the network takes them."""


@dataclass(frozen=True)
class NetworkConfig:
    """What a config.pbtxt says of a network that one of our Python models runs.

    Its parameters say what is filled in: `optional_inputs`, zeros where a request leaves them out,
    and `lora_names`, the adapters in the order of the columns of `lora_scale`.
    """

    folder: Path
    """Of the network's files."""
    parameters: Mapping[str, str]
    inputs: Mapping[str, bool]
    """By name: whether Triton sends it with a dimension that the network does not know."""
    outputs: list[str]
    fillers: Fillers
    lora_names: list[str]

    @classmethod
    def from_triton(cls, args: Mapping[str, str]) -> NetworkConfig:
        """Read what Triton tells a model's `initialize`."""
        config = json.loads(args["model_config"])
        parameters = {
            key: value.get("string_value", "") for key, value in config["parameters"].items()
        }
        return cls(
            folder=Path(args["model_repository"]) / args["model_version"],
            parameters=parameters,
            inputs={entry["name"]: "reshape" in entry for entry in config["input"]},
            outputs=[entry["name"] for entry in config["output"]],
            fillers=json.loads(parameters.get("optional_inputs", "{}")),
            lora_names=json.loads(parameters.get("lora_names", "[]")),
        )

    def read(self, pb_utils: Any, request: Any) -> dict[str, NDArray[Any]]:
        """The inputs of a Triton request, of which optional ones may not be there.

        Raises:
            ValueError: one is missing that is not optional.
        """
        given = {}
        # A request may name adapters of a network that has none, which is to be told.
        for name, is_reshaped in {**self.inputs, LORA_SCALE: False}.items():
            tensor = pb_utils.get_input_tensor_by_name(request, name)
            if tensor is not None:
                array = tensor.as_numpy()
                # `reshape { }` in the config: the network sees the batch dimension alone.
                given[name] = array.reshape(-1) if is_reshaped else array
            elif name not in self.fillers and name != LORA_SCALE:
                raise ValueError(f"{name}: is missing")
        return given

    def wanted(self, request: Any) -> list[str]:
        """The outputs that a Triton request asks for."""
        # Triton lists all of them for a request that lists none.
        return request.requested_output_names() or self.outputs


def left_out(fillers: Fillers, given: Mapping[str, Sequence[int]]) -> dict[str, Shape]:
    """The shapes of those inputs that are to be zeros, where the shapes of others are `given`."""
    shapes: dict[str, Shape] = {}
    for name, filler in fillers.items():
        if name not in given:
            batch, _, height, width = given[filler["like"]]
            divisor = filler["divisor"]
            shapes[name] = (batch, filler["channels"], height // divisor, width // divisor)
    return shapes


class Adapters:
    """The LoRA adapters of a network that takes their weights as inputs; of another one, none."""

    def __init__(
        self,
        folder: Path,
        names: Sequence[str],
        inputs: Mapping[str, Sequence[Any]],
        *,
        place: Callable[[NDArray[np.float32]], Array] = np.asarray,
        join: Callable[[list[Array], int], Array] = np.concatenate,
    ) -> None:
        """Load the adapters.

        Args:
            inputs: the shapes of the network's inputs, by name.
            place: makes of numpy's array what the network takes.
            join: joins such arrays along an axis.

        Raises:
            ValueError: an adapter is one of another network.
        """
        downs = [name for name in inputs if name.endswith(DOWN)]
        layers = [name.removesuffix(DOWN) for name in downs]
        self._widths = {
            layer: (inputs[f"{layer}{DOWN}"][1], inputs[f"{layer}{UP}"][0]) for layer in layers
        }
        self._place = place
        self._join = join
        self._adapters = [self._load(folder / f"{name}.safetensors") for name in names]
        self._ranks = [len(adapter[downs[0]]) for adapter in self._adapters]
        # A network has no input of size 0: one component that nobody uses.
        self._none = self._placed(self._zeros(1))
        self._stacks: OrderedDict[tuple[int, ...], dict[str, Array]] = OrderedDict()

    def shares(
        self, scale: NDArray[np.float32] | None, batch: int
    ) -> tuple[dict[str, NDArray[np.float32]], dict[str, Array]]:
        """The network's inputs for rows of which each takes its own share of every adapter.

        Args:
            scale: (batch, number of adapters), or None where no row uses any.

        Returns:
            What each row has of its own, (batch, ...), and the weights, which all rows share. Of a
            set of adapters the weights are the same objects again, mostly.

        Raises:
            ValueError: there are other adapters, or none.
        """
        if scale is not None and scale.shape != (batch, len(self._adapters)):
            raise ValueError(
                f"{LORA_SCALE}: has shape {scale.shape}, for {batch} rows and "
                f"{len(self._adapters)} adapters"
            )
        if not self._widths:
            return {}, {}
        used = () if scale is None else tuple(np.flatnonzero(scale.any(axis=0)).tolist())
        if scale is None or not used:
            return {LORA_SCALE: np.zeros((batch, 1), np.float32)}, self._none
        ranks = [self._ranks[column] for column in used]
        return {LORA_SCALE: np.repeat(scale[:, used], ranks, axis=1)}, self._stack(used)

    def _stack(self, used: tuple[int, ...]) -> dict[str, Array]:
        """The adapters side by side, along their ranks."""
        if len(used) == 1:
            return self._adapters[used[0]]
        if used not in self._stacks:
            self._stacks[used] = {
                name: self._join(
                    [self._adapters[column][name] for column in used],
                    0 if name.endswith(DOWN) else 1,
                )
                for name in self._none
            }
        self._stacks.move_to_end(used)
        if len(self._stacks) > MAX_STACKS:
            self._stacks.popitem(last=False)
        return self._stacks[used]

    def _load(self, path: Path) -> dict[str, Array]:
        """An adapter as inputs of the network; layers that it leaves alone are zeros."""
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
        return self._placed(adapter)

    def _zeros(self, rank: int) -> dict[str, NDArray[np.float32]]:
        adapter = {}
        for layer, (width_in, width_out) in self._widths.items():
            adapter[f"{layer}{DOWN}"] = np.zeros((rank, width_in), np.float32)
            adapter[f"{layer}{UP}"] = np.zeros((width_out, rank), np.float32)
        return adapter

    def _placed(self, adapter: Mapping[str, NDArray[np.float32]]) -> dict[str, Array]:
        return {name: self._place(array) for name, array in adapter.items()}
