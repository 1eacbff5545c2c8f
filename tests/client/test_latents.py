"""Latents travel as .npy files, both ways."""

import dataclasses
from io import BytesIO

import numpy as np
import pytest

from darkroom import Latents

ARRAY = np.arange(4 * 2 * 3, dtype=np.float32).reshape(4, 2, 3)


def saved(array: np.ndarray) -> bytes:
    buffer = BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def test_bytes_and_back() -> None:
    latents = Latents.from_bytes(Latents(ARRAY, 7).to_bytes(), 8, {"model": "shapes"})

    np.testing.assert_array_equal(latents.array, ARRAY, strict=True)
    assert (latents.seed, latents.info) == (8, {"model": "shapes"})


def test_numpy_reads_the_bytes() -> None:
    np.testing.assert_array_equal(np.load(BytesIO(Latents(ARRAY, 7).to_bytes())), ARRAY)


def test_edited_latents_travel_as_float32_in_order() -> None:
    edited = Latents(np.asfortranarray(ARRAY.astype(np.float64)), 7)

    assert edited.to_bytes() == Latents(ARRAY, 7).to_bytes()


@pytest.mark.parametrize(
    "encoded",
    [
        b"",
        b"no latents",
        b"PK\x03\x04",
        saved(ARRAY)[:40],
        saved(ARRAY)[:-1],
        saved(ARRAY.astype(np.float64)),
        saved(ARRAY[0]),
    ],
)
def test_other_bytes_are_a_value_error(encoded: bytes) -> None:
    with pytest.raises(ValueError, match=r"latents|EOF|reshape|Failed to read"):
        Latents.from_bytes(encoded, 7, {})


def test_they_are_frozen_and_each_equals_itself_alone() -> None:
    latents = Latents(ARRAY, 7)

    with pytest.raises(dataclasses.FrozenInstanceError):
        latents.seed = 8
    assert latents == latents  # noqa: PLR0124  comparing arrays would raise
    assert latents != Latents(ARRAY, 7)
    assert len({latents, Latents(ARRAY, 7)}) == 2
