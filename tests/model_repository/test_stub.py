"""Reading the inputs of a request: one value, a pair, or any number."""

from typing import Any

import numpy as np
import pytest
import triton_python_backend_utils as pb_utils

import darkroom_stub as stub

SHAPES = {"seed": [1], "prompt": [1], "original_size": [2], "lora": [-1], "lora_scale": [-1]}


def read(**arrays: np.ndarray) -> stub.Fields:
    tensors = [pb_utils.Tensor(name, array) for name, array in arrays.items()]
    return stub.read_fields(pb_utils, pb_utils.InferenceRequest(inputs=tensors), SHAPES)


def test_shapes_are_those_of_the_config() -> None:
    inputs: list[dict[str, Any]] = [{"name": "seed", "dims": ["1"]}, {"name": "lora", "dims": [-1]}]

    assert stub.input_shapes({"input": inputs}) == {"seed": [1], "lora": [-1]}


def test_one_value_is_itself_and_several_are_a_tuple() -> None:
    fields = read(
        seed=np.array([7], np.int64),
        prompt=np.array([b"a cat"], np.object_),
        original_size=np.array([512, 768], np.int32),
        lora=np.array([b"pixelart"], np.object_),
        lora_scale=np.array([0.5, 1, 2], np.float32),
    )

    assert fields == {
        "seed": 7,
        "prompt": b"a cat",
        "original_size": (512, 768),
        "lora": (b"pixelart",),
        "lora_scale": (0.5, 1.0, 2.0),
    }
    assert type(fields["seed"]) is int


def test_what_is_left_out_is_left_out_and_none_of_many_is_an_empty_tuple() -> None:
    assert read(lora=np.zeros(0, np.object_)) == {"lora": ()}


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("seed", np.array([1, 2], np.int64), "shape [2] is not [1]"),
        ("seed", np.array([[1]], np.int64), "shape [1, 1] is not [1]"),
        ("original_size", np.array([512], np.int32), "shape [1] is not [2]"),
        ("lora_scale", np.ones((1, 2), np.float32), "shape [1, 2] is not [-1]"),
    ],
)
def test_another_shape_is_refused(name: str, array: np.ndarray, message: str) -> None:
    with pytest.raises(stub.MalformedField) as caught:
        read(**{name: array})

    assert (caught.value.field, str(caught.value)) == (name, message)


def test_too_many_bytes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stub, "MAX_BYTES", 4)
    assert read(lora=np.array([b"four", b"4444"], np.object_))

    with pytest.raises(stub.MalformedField, match="5 bytes is too long, allowed are 0 to 4"):
        read(lora=np.array([b"four", b"fives"], np.object_))
