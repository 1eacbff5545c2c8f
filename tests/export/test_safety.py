"""The safety checker decides as diffusers' does, in one graph."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from darkroom_export import ExportError, Precision, export_checkpoint
from darkroom_export.checkpoint import find_checkpoint, load_checkpoint
from darkroom_export.networks import InputShape
from darkroom_export.runner import open_network
from darkroom_export.safety import describe_safety_checker, safety_checker_spec
from darkroom_export.to_onnx import export_onnx
from darkroom_export.verify import network_reference, verify_network

SHAPES = [InputShape(1, 1, 1), InputShape(12, 1, 1)]


@pytest.fixture(scope="module")
def pipeline(make_checkpoint: Callable[[str], Path]) -> Any:
    files = find_checkpoint(str(make_checkpoint("tiny-sd15-safety")))
    return load_checkpoint(files, with_safety_checker=True).pipeline


def concepts_near(pictures: torch.Tensor, checker: Any) -> None:
    """Put thresholds where some pictures are over and some under, by concept or special care."""
    embeds = checker.visual_projection(checker.vision_model(pictures)[1])
    for concepts, thresholds, share in (
        (checker.concept_embeds, checker.concept_embeds_weights, 0.97),
        (checker.special_care_embeds, checker.special_care_embeds_weights, 0.6),
    ):
        concepts.data = torch.randn(concepts.shape, generator=torch.Generator().manual_seed(4))
        cosines = torch.cosine_similarity(embeds[:, None], concepts[None], dim=-1)
        thresholds.data = cosines.quantile(share, dim=0)


def test_the_graph_decides_as_diffusers(pipeline: Any, tmp_path: Path) -> None:
    checker = pipeline.safety_checker.float()
    pictures = torch.randn((40, 3, 224, 224), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        concepts_near(pictures, checker)
    _, expected = checker(pictures, np.zeros((40, 8, 8, 3), np.float32))
    spec = safety_checker_spec(pipeline)
    reference = network_reference(spec, SHAPES, 1)
    # Half precision is asked for, and not taken.
    export_onnx(spec, Precision.FP16, tmp_path / "model.onnx")
    record = verify_network(spec, reference, tmp_path / "model.onnx", Precision.FP16)
    run = open_network(tmp_path / "model.onnx")
    outputs = ["has_nsfw_concept", "concept_scores"]
    flags, scores = run({"clip_input": pictures.numpy()}, outputs)

    assert record["tolerance"] == 1e-4
    assert 0 < sum(expected) < 40
    assert flags.tolist() == [float(flag) for flag in expected]
    assert scores.shape == (40, 17)


def test_the_manifest_tells_how_a_picture_becomes_its_input(pipeline: Any) -> None:
    record = describe_safety_checker(pipeline)

    assert (record["network"], record["size"]) == ("safety_checker", 224)
    assert np.allclose(record["mean"], [0.48145466, 0.4578275, 0.40821073])
    assert np.allclose(record["std"], [0.26862954, 0.26130258, 0.27577711])


def test_a_checkpoint_without_one_is_refused(
    make_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source = str(make_checkpoint("tiny-sd15"))

    with pytest.raises(ExportError, match="so the checkpoint has no safety checker"):
        export_checkpoint(source, tmp_path / "target", safety_checker=True)
    assert list(tmp_path.iterdir()) == []
