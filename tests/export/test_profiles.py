"""What people ask of engines, and what that comes to in the networks' inputs."""

from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from darkroom_export import ExportError
from darkroom_export.profiles import (
    PRESETS,
    Calls,
    Dimension,
    NetworkProfile,
    Networks,
    ShapeRange,
    Span,
    Wishes,
    make_plan,
    read_inputs,
)

LIMITS = {
    "default_width": 512,
    "default_height": 512,
    "min_size": 128,
    "max_size": 1024,
    "size_multiple": 64,
    "max_embeddings_multiples": 4,
}
LARGE = {**LIMITS, "default_width": 1024, "default_height": 1024, "max_size": 2048}
UNET = {
    "sample": (
        Dimension(1, "batch"),
        Dimension(4),
        Dimension(8, "height"),
        Dimension(8, "width"),
    ),
    "timestep": (Dimension(1, "batch"),),
    "encoder_hidden_states": (Dimension(1, "batch"), Dimension(1, "sequence"), Dimension(768)),
    "mid_block_res_sample": (
        Dimension(1, "batch"),
        Dimension(1280),
        Dimension(1, "height"),
        Dimension(1, "width"),
    ),
}


def manifest(**changed: Any) -> dict[str, Any]:
    clip = {"network": "text_encoder", "kind": "clip", "tokenizer": {"max_length": 77}}
    return {
        "text": {"encoders": [clip], "num_blank_tokens": 0},
        "denoiser": {"network": "unet"},
        "controlnets": {"canny": {"network": "controlnet_canny"}},
        "variants": {"ink": {"unet": "unet_ink", "text_encoder": "text_encoder_ink"}},
        "latents": {"vae_scale_factor": 8},
        "limits": LIMITS,
        **changed,
    }


def shapes(
    network: str, inputs: dict[str, tuple[Dimension, ...]], wishes: Wishes, **changed: Any
) -> list[dict[str, ShapeRange]]:
    described = manifest(**changed)
    plan = make_plan(wishes, described["limits"])
    return [profile.shapes for profile in Networks(described).profiles(network, inputs, plan)]


def picture(channels: int, factor: int = 1) -> dict[str, tuple[Dimension, ...]]:
    sides = (Dimension(factor, "height"), Dimension(factor, "width"))
    return {"picture": (Dimension(1, "batch"), Dimension(channels), *sides)}


@pytest.mark.parametrize(
    ("preset", "limits", "batches", "sides"),
    [
        ("native", LIMITS, ["1:8:32"], "512:512:512"),
        ("native", LARGE, ["1:2:8"], "1024:1024:1024"),
        ("buckets", LIMITS, ["1:2:2", "3:4:4", "5:8:8", "9:16:16", "17:32:32"], "512:512:512"),
        ("buckets", LARGE, ["1:2:2", "3:4:4", "5:8:8"], "1024:1024:1024"),
        ("dynamic", LIMITS, ["1:2:8"], "128:512:1024"),
        ("dynamic", LARGE, ["1:2:2"], "128:1024:2048"),
        ("max-batch", LIMITS, ["1:63:63"], "512:512:512"),
    ],
)
def test_presets_follow_from_the_limits(
    preset: str, limits: dict[str, Any], batches: list[str], sides: str
) -> None:
    plan = make_plan(Wishes(preset=preset), limits)

    assert [str(calls.batch) for calls in plan.profiles] == batches
    assert {str(calls.height) for calls in plan.profiles} == {sides}
    assert {str(calls.width) for calls in plan.profiles} == {sides}
    assert plan.max_rows == plan.profiles[-1].batch.max


def test_long_prompts_are_in_the_preset_for_all() -> None:
    assert {
        preset: make_plan(Wishes(preset=preset), LIMITS).prompt_multiples.max for preset in PRESETS
    } == {"native": 1, "buckets": 1, "dynamic": 3, "max-batch": 1}
    short = {**LIMITS, "max_embeddings_multiples": 1}
    assert make_plan(Wishes(preset="dynamic"), short).prompt_multiples.max == 1


def test_a_denoiser_counts_rows_pixels_and_chunks() -> None:
    wishes = Wishes(batch="1:2:4", height="512:768:1024", width="512", prompt_multiples="1:1:3")

    (profile,) = shapes("unet", UNET, wishes)

    assert profile == {
        "sample": ShapeRange((1, 4, 64, 64), (2, 4, 96, 64), (4, 4, 128, 64)),
        "timestep": ShapeRange((1,), (2,), (4,)),
        # Prompts of 2 and of 3 chunks, side by side, are both repeated to 6.
        "encoder_hidden_states": ShapeRange((1, 77, 768), (2, 77, 768), (4, 462, 768)),
        "mid_block_res_sample": ShapeRange((1, 1280, 8, 8), (2, 1280, 12, 8), (4, 1280, 16, 8)),
    }


@pytest.mark.parametrize(
    ("network", "channels", "factor", "expected"),
    [
        ("vae_decoder", 4, 1, ShapeRange((1, 4, 64, 64), (2, 4, 64, 64), (4, 4, 128, 64))),
        ("vae_encoder", 3, 8, ShapeRange((1, 3, 512, 512), (1, 3, 512, 512), (1, 3, 1024, 512))),
        (
            "controlnet_canny",
            3,
            64,
            ShapeRange((1, 3, 512, 512), (3, 3, 512, 512), (5, 3, 1024, 512)),
        ),
        ("unet_ink", 4, 8, ShapeRange((1, 4, 64, 64), (3, 4, 64, 64), (5, 4, 128, 64))),
    ],
)
def test_each_network_counts_in_its_own_units(
    network: str, channels: int, factor: int, expected: ShapeRange
) -> None:
    wishes = Wishes(batch="1:3:5", height="512:512:1024", pictures="1:2:4")

    (profile,) = shapes(network, picture(channels, factor), wishes)

    assert profile == {"picture": expected}


@pytest.mark.parametrize("network", ["text_encoder", "text_encoder_ink"])
def test_a_text_encoder_gets_the_chunks_of_one_prompt(network: str) -> None:
    ids = {"input_ids": (Dimension(1, "batch"), Dimension(77))}

    (profile,) = shapes(network, ids, Wishes(preset="buckets", prompt_multiples="1:1:2"))

    assert profile == {"input_ids": ShapeRange((1, 77), (1, 77), (2, 77))}


def test_the_safety_checker_looks_at_one_picture() -> None:
    inputs = {"clip_input": (Dimension(1, "batch"), Dimension(3), Dimension(224), Dimension(224))}

    (profile,) = shapes("safety_checker", inputs, Wishes(preset="max-batch"))

    assert profile == {"clip_input": ShapeRange(*[(1, 3, 224, 224)] * 3)}


def test_tokens_of_t5_come_once_and_blank_ones_with_them() -> None:
    clip = {"network": "text_encoder", "kind": "clip", "tokenizer": {"max_length": 77}}
    t5 = {"network": "text_encoder_3", "kind": "t5", "tokenizer": {"max_length": 256}}
    limits = {**LIMITS, "max_embeddings_multiples": 1}
    lengths = [
        shapes("unet", UNET, Wishes(batch="1"), text=text, limits=limits)[0][
            "encoder_hidden_states"
        ].max
        for text in (
            {"encoders": [clip, clip, t5], "num_blank_tokens": 0},
            {"encoders": [clip, clip], "num_blank_tokens": 256},
        )
    ]

    assert lengths == [(1, 333, 768)] * 2


def test_several_profiles_take_from_the_preset_what_they_leave_out() -> None:
    wishes = Wishes(profiles=["batch=1:2:8,height=512:768:1024", "width=768,batch=1"])

    plan = make_plan(wishes, LIMITS)

    assert plan.profiles == (
        Calls(Span(1, 2, 8), Span(512, 768, 1024), Span.of(512)),
        Calls(Span.of(1), Span.of(512), Span.of(768)),
    )


def test_a_call_has_no_more_rows_than_every_size_takes() -> None:
    wishes = Wishes(profiles=["batch=1:4:8,height=512:512:1024", "batch=9:16:32", "batch=40:40:63"])

    assert make_plan(wishes, LIMITS).max_rows == 8


def test_limits_become_what_engines_can_do() -> None:
    plan = make_plan(Wishes(height="512:512:768", width="512:512:768"), LIMITS)

    assert plan.limits(LIMITS) == {
        **LIMITS,
        "min_size": 512,
        "max_size": 768,
        "max_embeddings_multiples": 1,
    }


def test_limits_name_the_sizes_that_go_together() -> None:
    plan = make_plan(Wishes(profiles=["height=768,width=512", "height=512,width=768"]), LIMITS)

    limits = plan.limits(LIMITS)

    assert limits["sizes"] == [[[512, 512], [768, 768]], [[768, 768], [512, 512]]]
    assert (limits["min_size"], limits["max_size"]) == (512, 768)
    # The checkpoint's own size is none of them.
    assert (limits["default_height"], limits["default_width"]) == (768, 512)


def test_corners_are_all_ends_and_the_best() -> None:
    profile = NetworkProfile(
        {"x": (Dimension(1, "batch"), Dimension(2, "height"))},
        {"batch": Span(1, 2, 4), "height": Span(8, 8, 16)},
    )

    corners = [shape["x"] for shape in profile.corners()]

    assert corners == [(2, 16), (1, 16), (1, 32), (4, 16), (4, 32)]


def test_profiles_that_come_to_the_same_are_one() -> None:
    assert len(shapes("vae_decoder", picture(4), Wishes(preset="buckets"))) == 1
    assert len(shapes("unet", UNET, Wishes(preset="buckets"))) == 5


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        (Wishes(preset="huge"), "preset: 'huge' is none, there are native, buckets, dynamic, max"),
        (Wishes(batch="a"), "batch: 'a' is neither a number nor MIN:OPT:MAX"),
        (Wishes(batch="1:2"), "batch: '1:2' is neither"),
        (Wishes(batch="1:4:2"), "batch: '1:4:2' is not in order, allowed is MIN <= OPT <= MAX"),
        (Wishes(batch="1:8:64"), "batch: 64 in 1:8:64 is not allowed, but 1 to 63"),
        (Wishes(batch="0:8:8"), "batch: 0 in 0:8:8 is not allowed, but 1 to 63"),
        (
            Wishes(height="512:520:576"),
            "height: 520 in 512:520:576 is not allowed, but the multiples of 64 from 128 to 1024",
        ),
        (Wishes(width="64:512:512"), "width: 64 in 64:512:512 is not allowed, but the multiples"),
        (Wishes(width="512:512:2048"), "width: 2048 in 512:512:2048 is not allowed"),
        (
            Wishes(prompt_multiples="1:1:5"),
            "prompt-multiples: 5 in 1:1:5 is not allowed, but 1 to 4",
        ),
        (Wishes(prompt_multiples="2"), "prompt-multiples: begins at 2, but there are always calls"),
        (Wishes(pictures="64"), "pictures: 64 in 64:64:64 is not allowed, but 1 to 63"),
        (Wishes(pictures="2:2:4"), "pictures: begins at 2"),
        (Wishes(batch="2:4:8"), "batch: begins at 2, but there are always calls of 1"),
        (
            Wishes(profiles=["batch=1:2:8", "batch=2:4:8,height=768"]),
            "batch: at some sizes no profile begins at 1",
        ),
        (
            Wishes(profiles=["batch=1", "height=500"]),
            "profile 2: height: 500 in 500:500:500 is not allowed",
        ),
        (Wishes(profiles=["depth=1"]), "profile: 'depth=1' in 'depth=1' is not one of batch, hei"),
        (Wishes(profiles=["batch=1,batch=2"]), "profile: 'batch=2' in 'batch=1,batch=2' is not"),
        (Wishes(profiles=["width=x"]), "profile: width: 'x' is neither a number nor MIN:OPT:MAX"),
    ],
)
def test_what_cannot_be_is_refused_by_name(wishes: Wishes, message: str) -> None:
    with pytest.raises(ExportError) as refusal:
        make_plan(wishes, LIMITS)

    assert str(refusal.value).startswith(message)


def save_graph(path: Path, *sizes: int | str | None) -> Path:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, sizes)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    weight = helper.make_tensor("w", TensorProto.FLOAT, [1], [1.0])
    graph = helper.make_graph(
        [helper.make_node("Mul", ["x", "w"], ["y"])],
        "scale",
        [x, helper.make_tensor_value_info("w", TensorProto.FLOAT, [1])],
        [y],
        [weight],
    )
    onnx.save(helper.make_model(graph), path)
    return path


def test_dimensions_are_read_from_the_graph(tmp_path: Path) -> None:
    graph = save_graph(tmp_path / "model.onnx", "batch", 4, "8*height", "width")

    assert read_inputs("unet", graph) == {
        "x": (
            Dimension(1, "batch"),
            Dimension(4),
            Dimension(8, "height"),
            Dimension(1, "width"),
        )
    }


def test_a_dimension_that_nothing_tells_the_size_of_is_refused(tmp_path: Path) -> None:
    inputs = read_inputs("unet", save_graph(tmp_path / "model.onnx", "batch", "rank"))

    with pytest.raises(ExportError, match="unet: x: its dimension 'rank' has no size here, only b"):
        shapes("unet", inputs, Wishes())


def test_a_dimension_that_is_no_product_is_refused(tmp_path: Path) -> None:
    graph = save_graph(tmp_path / "model.onnx", "batch", "height + 1")

    with pytest.raises(ExportError, match=r"unet: x: the dimension 'height \+ 1' is none of an"):
        read_inputs("unet", graph)


@pytest.mark.parametrize("content", [None, b"no graph"])
def test_a_file_that_is_no_graph_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "model.onnx"
    if content is not None:
        path.write_bytes(content)

    with pytest.raises(ExportError, match=r"model\.onnx: "):
        read_inputs("unet", path)
