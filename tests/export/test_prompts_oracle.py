"""Prompts through the exported text encoder, as transformers, diffusers and ComfyUI read them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import triton_python_backend_utils as pb_utils

from darkroom_engine import Manifest, TritonNetworks
from darkroom_engine.prompts import PromptEncoder
from darkroom_engine.tokenizer import PromptTokenizer
from darkroom_export import Precision
from darkroom_export.checkpoint import find_checkpoint, load_checkpoint
from darkroom_export.export import _write_tokenizer
from darkroom_export.networks import network_specs
from darkroom_export.to_onnx import export_onnx
from darkroom_export.verify import open_session

EMBEDDED = Path(__file__).parents[2] / "shapes" / "checkpoint"
TOLERANCE = 1e-5
CLIP_SKIPS = (0, 1, 2)
"""Of a text encoder of two layers, hence down to what the first of them reads."""


@pytest.fixture(scope="module")
def pipeline() -> Any:
    """The embedded checkpoint in PyTorch."""
    pipeline = load_checkpoint(find_checkpoint(str(EMBEDDED))).pipeline
    if not hasattr(pipeline.text_encoder, "text_model"):
        # diffusers' clip_skip reaches through a layer that transformers 5 gave up.
        object.__setattr__(pipeline.text_encoder, "text_model", pipeline.text_encoder)
    return pipeline


@pytest.fixture(scope="module")
def encoder(
    fp32: Path, pipeline: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[PromptEncoder]:
    """The engine's encoder, over the exported text encoder of the embedded checkpoint."""
    folder = tmp_path_factory.mktemp("text-encoder")
    # A checkpoint of its own, because exporting changes the module.
    spec = network_specs(load_checkpoint(find_checkpoint(str(EMBEDDED))).pipeline)[0]
    export_onnx(spec, Precision.FP32, folder / "model.onnx")
    session = open_session(folder / "model.onnx")
    names = [tensor.name for tensor in spec.outputs]
    pb_utils.server.reset()
    pb_utils.server.models[spec.name] = lambda inputs: dict(
        zip(names, session.run(names, inputs), strict=True)
    )
    config = _write_tokenizer(pipeline.tokenizer, folder)
    # Of the manifest, only the names of the networks matter here.
    networks = TritonNetworks(pb_utils, "engine", Manifest.load(fp32 / "manifest.json"))
    yield PromptEncoder(PromptTokenizer.from_config(config, folder), networks, 2**24)
    pb_utils.server.reset()


def reference(pipeline: Any, segments: list[tuple[str, float]], clip_skip: int) -> np.ndarray:
    """What ComfyUI does with weighted segments, in chunks of 75 tokens, by transformers alone."""
    tokenizer, model = pipeline.tokenizer, pipeline.text_encoder
    tokens = [
        (token, weight)
        for text, weight in segments
        for token in tokenizer(text, add_special_tokens=False).input_ids
    ]
    begin, end, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    chunks = [
        [(begin, 1.0), *tokens[start : start + 75], (end, 1.0)]
        for start in range(0, max(len(tokens), 1), 75)
    ]
    chunks.append([(begin, 1.0), (end, 1.0)])
    for chunk in chunks:
        chunk.extend([(pad, 1.0)] * (77 - len(chunk)))
    ids = torch.tensor([[token for token, _ in chunk] for chunk in chunks])
    with torch.no_grad():
        layers = model(ids, output_hidden_states=True).hidden_states
        hidden = model.text_model.final_layer_norm(layers[-(clip_skip + 1)])
    empty = hidden[-1]
    for row, chunk in enumerate(chunks[:-1]):
        for position, (_, weight) in enumerate(chunk):
            if weight != 1.0:
                difference = hidden[row, position] - empty[position]
                hidden[row, position] = difference * weight + empty[position]
    return torch.cat(list(hidden[:-1])).numpy()


def encoded(encoder: PromptEncoder, text: str, clip_skip: int) -> np.ndarray:
    return encoder.encode(text, clip_skip, 4)["encoder_hidden_states"]


LONG = "a large red circle on a blue background, and then a small green star "


@pytest.mark.parametrize("clip_skip", CLIP_SKIPS)
@pytest.mark.parametrize(
    ("text", "segments"),
    [
        ("", []),
        ("a red circle", [("a red circle", 1)]),
        ("a (red:1.4) circle", [("a ", 1), ("red", 1.4), (" circle", 1)]),
        (
            "((a red:0.5) circle:-2) (on) blue",
            [("a red", -1), (" circle", -2), (" ", 1), ("on", 1.1), (" blue", 1)],
        ),
        (LONG * 6, [(LONG * 6, 1)]),
        (
            f"{LONG * 5}({LONG * 5}:0.7){LONG * 3}",
            [(LONG * 5, 1), (LONG * 5, 0.7), (LONG * 3, 1)],
        ),
    ],
    ids=["empty", "plain", "weighted", "nested", "long", "long and weighted"],
)
def test_prompts_are_read_as_comfyui_and_transformers_read_them(
    encoder: PromptEncoder,
    pipeline: Any,
    text: str,
    segments: list[tuple[str, float]],
    clip_skip: int,
) -> None:
    expected = reference(pipeline, segments, clip_skip)
    actual = encoded(encoder, text, clip_skip)

    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() < TOLERANCE


@pytest.mark.parametrize("clip_skip", CLIP_SKIPS)
@pytest.mark.parametrize("text", ["", "a large red circle on a blue background"])
def test_clip_skip_is_diffusers(
    encoder: PromptEncoder, pipeline: Any, text: str, clip_skip: int
) -> None:
    with torch.no_grad():
        (expected,), _ = pipeline.encode_prompt(text, "cpu", 1, False, clip_skip=clip_skip)

    assert np.abs(encoded(encoder, text, clip_skip) - expected.numpy()).max() < TOLERANCE


def test_without_clip_skip_it_is_what_diffusers_makes_by_default(
    encoder: PromptEncoder, pipeline: Any
) -> None:
    with torch.no_grad():
        (expected,), _ = pipeline.encode_prompt("a red circle", "cpu", 1, False)

    assert np.abs(encoded(encoder, "a red circle", 0) - expected.numpy()).max() < TOLERANCE


def test_each_layer_is_another(encoder: PromptEncoder) -> None:
    layers = [encoded(encoder, "a red circle", clip_skip) for clip_skip in CLIP_SKIPS]

    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert np.abs(layers[first] - layers[second]).max() > 0.1


def test_the_long_prompts_are_of_many_chunks(encoder: PromptEncoder) -> None:
    lengths = [len(encoded(encoder, LONG * count, 0)) for count in (3, 6, 13)]

    assert lengths == [77, 2 * 77, 4 * 77]
