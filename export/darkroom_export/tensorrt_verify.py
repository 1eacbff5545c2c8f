"""Compare an engine with the graph that it was built of, by Polygraphy."""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from polygraphy.backend.base import BaseRunner
from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx
from polygraphy.comparator import Comparator, IterationResult
from polygraphy.exception import PolygraphyException
from polygraphy.logger import G_LOGGER

from darkroom_export.errors import ExportError, first_line
from darkroom_export.profiles import NetworkProfile, Shape
from darkroom_export.tensorrt_inputs import Inputs

Array = NDArray[Any]
ROWS_AT_ONCE = 1
"""Of the graph: attention over a large batch, if not fused, takes more memory than hosts have."""
_SEED = 30


@dataclass(frozen=True)
class Difference:
    """How far an output of an engine is from the graph's."""

    error: float
    """The largest difference, as a fraction of the largest expected value."""
    tolerance: float

    def __bool__(self) -> bool:
        """Whether it is allowed, which is what Polygraphy asks; what is not a number is not."""
        return self.error <= self.tolerance


def graph_runner(onnx: Path) -> BaseRunner:
    """Runs the graph on a GPU if ONNX Runtime can, without TensorFloat32, else on the CPU."""
    providers: list[Any] = ["cpu"]
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        providers.insert(0, ("cuda", {"use_tf32": "0"}))
    with G_LOGGER.verbosity(G_LOGGER.ERROR):
        session = SessionFromOnnx(str(onnx), providers=providers)()
    return OnnxrtRunner(FewRows(session), name="ONNX Runtime")


class FewRows:
    """An ONNX Runtime session that takes a batch in pieces: no operation of ours mixes rows."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self.get_inputs, self.get_outputs = session.get_inputs, session.get_outputs

    def run(self, outputs: Sequence[str] | None, inputs: Mapping[str, Array]) -> list[Array]:
        num_rows = len(next(iter(inputs.values())))
        pieces = [
            self._session.run(
                outputs, {name: rows[start : start + ROWS_AT_ONCE] for name, rows in inputs.items()}
            )
            for start in range(0, num_rows, ROWS_AT_ONCE)
        ]
        return [np.concatenate(rows) for rows in zip(*pieces, strict=True)]


def compare_profiles(
    network: str,
    graph: BaseRunner,
    engine: Callable[[int], BaseRunner],
    profiles: Sequence[NetworkProfile],
    *,
    inputs: Inputs,
    tolerance: float,
) -> dict[str, Any]:
    """Compare at every corner of every profile; returns the manifest's record of the result.

    Raises:
        ExportError: names the output and the shapes where it is not finite, of another shape, or
            off by more than allowed.
    """
    errors: dict[str, float] = {}
    for number, profile in enumerate(profiles):
        corners = profile.corners()
        found = compare(network, graph, engine(number), corners, inputs=inputs, tolerance=tolerance)
        for output, error in found.items():
            errors[output] = max(errors.get(output, 0.0), error)
    return {
        "error": max(errors.values()),
        "errors": errors,
        "tolerance": tolerance,
        "num_corners": sum(len(profile.corners()) for profile in profiles),
    }


def compare(
    network: str,
    graph: BaseRunner,
    engine: BaseRunner,
    corners: Sequence[Mapping[str, Shape]],
    *,
    inputs: Inputs,
    tolerance: float,
) -> dict[str, float]:
    """Compare at some shapes of the inputs; returns the error of each output.

    Raises:
        ExportError: as of `compare_profiles`.
    """
    where = _Where()

    def feeds() -> Iterator[dict[str, Array]]:
        for number, shapes in enumerate(corners):
            where.shapes = shapes
            yield inputs.draw(shapes, _SEED + number)

    def differences(
        expected: IterationResult, actual: IterationResult
    ) -> OrderedDict[str, Difference]:
        if set(expected) != set(actual):
            raise ExportError(
                f"{network}: the engine gives {sorted(actual)}, the graph {sorted(expected)}"
            )
        return OrderedDict(
            (name, Difference(_error(f"{network}: {name}{where}", actual[name], array), tolerance))
            for name, array in expected.items()
        )

    try:
        with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
            # Large batches would not all fit into memory, so that each is compared when it is made.
            runs = Comparator.run([graph, engine], data_loader=feeds(), streaming=True)
            (results,) = Comparator.compare_accuracy(runs, compare_func=differences)
    except PolygraphyException as error:
        raise ExportError(f"{network}{where}: cannot be compared, {first_line(error)}") from error
    (iterations,) = results.values()
    errors: dict[str, float] = {}
    for shapes, outputs in zip(corners, iterations, strict=True):
        for name, difference in outputs.items():
            if not difference:
                raise ExportError(
                    f"{network}: {name}{_Where(shapes)}: the engine differs from its graph by "
                    f"{difference.error:.2e} of its range, allowed is {tolerance:.0e}"
                )
            errors[name] = max(errors.get(name, 0.0), difference.error)
    return errors


@dataclass
class _Where:
    """The call that is compared, for messages."""

    shapes: Mapping[str, Shape] | None = None

    def __str__(self) -> str:
        if not self.shapes:
            return ""
        return " at " + ", ".join(
            f"{name} {'x'.join(map(str, shape))}" for name, shape in self.shapes.items()
        )


def _error(name: str, actual: Array, expected: Array) -> float:
    if actual.shape != expected.shape:
        raise ExportError(f"{name}: the engine gives {actual.shape}, the graph {expected.shape}")
    for maker, array in (("graph", expected), ("engine", actual)):
        if not np.isfinite(array).all():
            raise ExportError(
                f"{name}: what the {maker} gives is not finite, the precision may be too low for it"
            )
    # Of zeros alone, the difference itself.
    largest = float(np.abs(expected).max()) or 1.0
    return float(np.abs(actual - expected).max()) / largest
