"""Noise is PyTorch's, so that a seed means the same picture here and in diffusers."""

import numpy as np
import pytest

from darkroom_engine.noise import GaussianNoise

SHAPES = [(4, 16, 16), (4, 64, 64), (1, 4, 4), (3, 5, 7), (17,)]
SEEDS = [0, 1, 42, 2**31, 2**32 - 1, 2**32, 2**63 - 1]


@pytest.mark.torch
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_pytorchs_cpu_generator(seed: int, shape: tuple[int, ...]) -> None:
    torch = pytest.importorskip("torch")
    generator = torch.Generator("cpu").manual_seed(seed)
    noise = GaussianNoise(seed)

    for _ in range(3):
        expected = torch.randn(shape, generator=generator).numpy()
        np.testing.assert_allclose(noise.draw(shape), expected, rtol=0, atol=2e-6)


def test_is_known_without_pytorch() -> None:
    """The first values of torch.randn(16) with seed 0, to four decimals as it prints them."""
    noise = GaussianNoise(0).draw((16,))

    np.testing.assert_allclose(noise[:4], [-1.1258, -1.1524, -0.2506, -0.4339], atol=5e-5)


def test_is_standard_normal() -> None:
    noise = GaussianNoise(7).draw((4, 128, 128))

    assert abs(noise.mean()) < 0.01
    assert abs(noise.std() - 1) < 0.01
    assert noise.dtype == np.float32


def test_too_small_a_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shape: \(3,\) has 3 elements, at least 16"):
        GaussianNoise(0).draw((3,))
