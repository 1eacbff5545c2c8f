"""Seeded Gaussian noise, the same numbers that PyTorch's CPU generator gives.

A picture's noise depends on its seed and shape alone, never on its neighbours. Being PyTorch's, it
makes a seed mean the same picture here as in diffusers with `torch.Generator("cpu")`, without
PyTorch in the serving process. (PyTorch takes the low 32 bits of a seed, and so do we.)
"""

import numpy as np
from numpy.typing import NDArray

_BLOCK = 16


class GaussianNoise:
    """The stream of `torch.Generator("cpu").manual_seed(seed)`, read by `torch.randn`, to 1e-6.

    Mersenne Twister (Matsumoto & Nishimura 1998) and the Box-Muller transform (1958), in blocks of
    16: the first 8 uniforms of a block are radii, the other 8 are angles.
    """

    def __init__(self, seed: int) -> None:
        self._twister = np.random.RandomState(seed & 0xFFFFFFFF)

    def draw(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """The next noise of the stream.

        Args:
            shape: at least 16 elements; PyTorch draws fewer in another way.
        """
        size = int(np.prod(shape))
        if size < _BLOCK:
            raise ValueError(f"shape: {shape} has {size} elements, at least {_BLOCK} are needed")
        tail = size % _BLOCK
        # An odd end is filled by drawing its last block anew.
        words = self._twister.randint(0, 2**32, size + (_BLOCK if tail else 0), np.uint32)
        # 24 bits each, the precision of a float32 in [0, 1).
        uniform = (words & 0xFFFFFF).astype(np.float32) * np.float32(2**-24)
        noise = np.empty(size, np.float32)
        whole = size - tail
        noise[:whole] = _box_muller(uniform[:whole])
        if tail:
            noise[-_BLOCK:] = _box_muller(uniform[-_BLOCK:])
        return noise.reshape(shape)


def _box_muller(uniform: NDArray[np.float32]) -> NDArray[np.float32]:
    blocks = uniform.reshape(-1, 2, _BLOCK // 2)
    radius = np.sqrt(-2 * np.log(1 - blocks[:, 0]))
    angle = np.float32(2 * np.pi) * blocks[:, 1]
    noise: NDArray[np.float32] = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    return noise.reshape(-1)
