"""What belongs to the names of ControlNets and adapters comes in lists of equal length."""

from typing import Any

import numpy as np
import pytest

from darkroom import InvalidRequest
from darkroom.per_name import with_lists


def test_one_of_each_needs_no_list() -> None:
    asked = {
        "controlnet": "canny",
        "control_image": "edges.png",
        "controlnet_conditioning_scale": 0.5,
        "control_guidance_start": 0,
        "control_guidance_end": 0.8,
        "lora": "ink",
        "lora_scale": 0.7,
        "prompt": "a cat",
    }

    assert with_lists(asked) == {
        "controlnet": ["canny"],
        "control_image": ["edges.png"],
        "controlnet_conditioning_scale": [0.5],
        "control_guidance_start": [0],
        "control_guidance_end": [0.8],
        "lora": ["ink"],
        "lora_scale": [0.7],
        "prompt": "a cat",
    }


@pytest.mark.parametrize("scale", [0.5, 1, np.float32(0.5)])
def test_one_number_is_for_all_names(scale: float) -> None:
    asked = {
        "controlnet": ("canny", "depth"),
        "control_image": ("edges.png", b"depths"),
        "controlnet_conditioning_scale": scale,
        "lora": ["ink", "wash"],
        "lora_scale": scale,
    }

    assert with_lists(asked) == {
        "controlnet": ["canny", "depth"],
        "control_image": ["edges.png", b"depths"],
        "controlnet_conditioning_scale": [scale, scale],
        "lora": ["ink", "wash"],
        "lora_scale": [scale, scale],
    }


def test_adapters_may_be_mapped_to_their_scales() -> None:
    assert with_lists({"lora": {"ink": 0.7, "wash": 1}}) == {
        "lora": ["ink", "wash"],
        "lora_scale": [0.7, 1],
    }


@pytest.mark.parametrize("nothing", [{"lora": []}, {"lora": {}}, {"controlnet": ()}, {}])
def test_no_names_are_left_out(nothing: dict[str, Any]) -> None:
    assert with_lists(nothing) == {}
    assert with_lists({**nothing, "control_image": []}) == {}


def test_the_fields_that_were_given_stay_as_they_are() -> None:
    asked = {"lora": {"ink": 0.7}}
    with_lists(asked)

    assert asked == {"lora": {"ink": 0.7}}


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            {"controlnet": ["canny", "depth"], "control_image": "edges.png"},
            "control_image: 1 given, allowed is one for each name of controlnet: 2",
        ),
        (
            {"controlnet": "canny"},
            "control_image: 0 given, allowed is one for each name of controlnet: 1",
        ),
        (
            {
                "controlnet": "canny",
                "control_image": "edges.png",
                "control_guidance_end": [0.5, 0.8],
            },
            "control_guidance_end: 2 given, allowed is one for each name of controlnet: 1",
        ),
        (
            {"lora": ["ink", "wash"], "lora_scale": [0.5]},
            "lora_scale: 1 given, allowed is one for each name of lora: 2",
        ),
        ({"control_image": "edges.png"}, "control_image: needs the names .*, controlnet"),
        ({"controlnet_conditioning_scale": 1.0}, "controlnet_conditioning_scale: needs the names"),
        ({"lora": [], "lora_scale": 0.5}, "lora_scale: needs the names that it belongs to, lora"),
        ({"lora": {"ink": 0.7}, "lora_scale": 0.5}, "lora_scale: given twice"),
    ],
)
def test_lists_that_do_not_fit_are_refused(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=f"^{message}"):
        with_lists(asked)
