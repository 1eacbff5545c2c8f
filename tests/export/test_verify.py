"""What is not what PyTorch makes of it is found: each network alone, and all in the loop."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from darkroom_export import ExportError, Precision
from darkroom_export.checkpoint import find_checkpoint, load_checkpoint
from darkroom_export.families import FAMILIES
from darkroom_export.loop import LoopReference, loop_reference, verify_loop
from darkroom_export.networks import NetworkSpec, network_specs
from darkroom_export.verify import (
    Reference,
    input_shapes,
    network_reference,
    relative_error,
    verify_network,
)

FAMILY = FAMILIES["sd1"]
TEXT = "text_encoder"
NETWORKS = (TEXT, "unet", "vae_decoder")


@pytest.fixture(scope="module")
def pipeline(checkpoint: Path) -> Any:
    return load_checkpoint(find_checkpoint(str(checkpoint))).pipeline


@pytest.fixture(scope="module")
def specs(pipeline: Any) -> dict[str, NetworkSpec]:
    return {spec.name: spec for spec in network_specs(pipeline, FAMILY)}


@pytest.fixture(scope="module")
def references(pipeline: Any, specs: dict[str, NetworkSpec]) -> dict[str, Reference]:
    shapes = input_shapes(pipeline, FAMILY)
    return {name: network_reference(spec, shapes, 3) for name, spec in specs.items()}


LoopInputs = tuple[LoopReference, dict[str, NetworkSpec], dict[str, Path]]


@pytest.fixture(scope="module")
def loop_inputs(fp32: Path, pipeline: Any, specs: dict[str, NetworkSpec]) -> LoopInputs:
    paths = {name: graph_of(fp32, name) for name in NETWORKS}
    return loop_reference(pipeline, FAMILY, 3), specs, paths


def graph_of(repository: Path, network: str) -> Path:
    return repository / network / "1" / "model.onnx"


def spoil(path: Path, target: Path, spoiled: Callable[[np.ndarray], np.ndarray]) -> Path:
    """A copy of a graph, with its largest weight changed."""
    model = onnx.load(path)
    largest = max(model.graph.initializer, key=lambda entry: np.prod(entry.dims))
    array = numpy_helper.to_array(largest)
    largest.CopyFrom(numpy_helper.from_array(spoiled(array).astype(array.dtype), largest.name))
    onnx.save(model, target)
    return target


@pytest.mark.parametrize("network", NETWORKS)
def test_the_right_network_passes(
    fp32: Path, specs: dict[str, NetworkSpec], references: dict[str, Reference], network: str
) -> None:
    path = graph_of(fp32, network)
    record = verify_network(specs[network], references[network], path, Precision.FP32)

    assert 0 <= record["error"] <= record["tolerance"]


@pytest.mark.parametrize("network", NETWORKS)
def test_a_network_with_slightly_wrong_weights_is_found(
    fp32: Path,
    tmp_path: Path,
    specs: dict[str, NetworkSpec],
    references: dict[str, Reference],
    network: str,
) -> None:
    path = spoil(graph_of(fp32, network), tmp_path / "wrong.onnx", lambda weights: 1.05 * weights)

    with pytest.raises(ExportError, match=rf"{network}: .* of wrong.onnx in fp32 differs"):
        verify_network(specs[network], references[network], path, Precision.FP32)


@pytest.mark.parametrize("network", NETWORKS)
def test_a_network_that_makes_nan_is_found(
    fp32: Path,
    tmp_path: Path,
    specs: dict[str, NetworkSpec],
    references: dict[str, Reference],
    network: str,
) -> None:
    path = spoil(graph_of(fp32, network), tmp_path / "nan.onnx", lambda w: np.full_like(w, np.nan))

    with pytest.raises(ExportError, match=f"{network}: .* is not finite, the precision"):
        verify_network(specs[network], references[network], path, Precision.FP32)


def test_a_network_of_another_shape_is_found(
    fp32: Path, specs: dict[str, NetworkSpec], references: dict[str, Reference]
) -> None:
    reference = references["vae_decoder"]
    cases = [(inputs, (pixels[:, :, ::2],)) for inputs, (pixels,) in reference.cases]
    path = graph_of(fp32, "vae_decoder")

    with pytest.raises(ExportError, match=r"vae_decoder: sample is .*, PyTorch's is \("):
        verify_network(specs["vae_decoder"], Reference(cases), path, Precision.FP32)


def test_a_reference_that_is_not_finite_verifies_nothing(
    fp32: Path, specs: dict[str, NetworkSpec], references: dict[str, Reference]
) -> None:
    nan = np.float32("nan")
    cases = [(inputs, (nan * output,)) for inputs, (output,) in references["unet"].cases]
    path = graph_of(fp32, "unet")

    with pytest.raises(ExportError, match="unet: out_sample of PyTorch is not finite"):
        verify_network(specs["unet"], Reference(cases), path, Precision.FP32)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda layers: layers * np.float32(1.01), "hidden_states of model.onnx in fp32 differs"),
        (lambda layers: layers[:, 1:], "hidden_states is .*, PyTorch's is"),
        (lambda layers: layers * np.float32("nan"), "hidden_states of PyTorch is not finite"),
    ],
)
def test_every_output_is_compared(
    fp32: Path,
    specs: dict[str, NetworkSpec],
    references: dict[str, Reference],
    wrong: Callable[[np.ndarray], np.ndarray],
    message: str,
) -> None:
    cases = [(inputs, (last, wrong(all_))) for inputs, (last, all_) in references[TEXT].cases]

    with pytest.raises(ExportError, match=f"text_encoder: {message}"):
        verify_network(specs[TEXT], Reference(cases), graph_of(fp32, TEXT), Precision.FP32)


def test_an_error_of_nan_is_no_error_of_zero() -> None:
    ones = np.ones(3, np.float32)

    for actual, expected in ((ones * np.nan, ones), (ones, ones * np.nan), (ones * np.inf, ones)):
        with pytest.raises(ExportError, match=r"it .*not finite"):
            relative_error("it", actual, expected)


def test_the_right_loop_passes(loop_inputs: LoopInputs) -> None:
    record = verify_loop(*loop_inputs, Precision.FP32)

    assert record["error"] <= record["tolerance"]
    assert record["picture_error"] <= record["picture_tolerance"]


@pytest.mark.parametrize(
    ("network", "factor"),
    # The picture hardly changes with one weight of the decoder, which normalises what it makes.
    [
        ("text_encoder", 1.5),
        ("unet", 1.5),
        ("text_encoder", np.nan),
        ("unet", np.nan),
        ("vae_decoder", np.nan),
    ],
)
def test_a_wrong_network_in_the_loop_is_found(
    loop_inputs: LoopInputs, tmp_path: Path, network: str, factor: float
) -> None:
    loop, specs, paths = loop_inputs
    wrong = spoil(paths[network], tmp_path / "wrong.onnx", lambda weights: factor * weights)

    with pytest.raises(ExportError, match="the loop"):
        verify_loop(loop, specs, paths | {network: wrong}, Precision.FP32)


def test_the_wrong_schedule_in_the_loop_is_found(loop_inputs: LoopInputs) -> None:
    loop, specs, paths = loop_inputs
    scheduler = loop.scheduler
    wrong = type(scheduler).from_config(scheduler.config, prediction_type="v_prediction")

    with pytest.raises(ExportError, match="the loop"):
        verify_loop(replace(loop, scheduler=wrong), specs, paths, Precision.FP32)


def test_the_wrong_scaling_in_the_loop_is_found(loop_inputs: LoopInputs) -> None:
    loop, specs, paths = loop_inputs

    with pytest.raises(ExportError, match=r"the loop .* picture by"):
        verify_loop(replace(loop, scaling_factor=0.5), specs, paths, Precision.FP32)
