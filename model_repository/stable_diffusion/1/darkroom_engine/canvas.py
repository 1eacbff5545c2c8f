"""What the pictures of a request start from, besides noise: a picture, or parts of one."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from darkroom_engine import pictures
from darkroom_engine.request import ImageRequest
from darkroom_engine.vae import Posterior, Vae

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Canvas:
    """What all pictures of a request have in common before any noise is drawn."""

    image: Posterior | Array | None = None
    """The starting picture as the encoder sees it, or the latents (C, h, w) given in its place."""
    mask: Array | None = None
    """(1, h, w), 1 where there is something to be made."""
    masked: Posterior | None = None
    """The picture without what is to be made, for a denoiser that is shown it."""
    controls: tuple[Array, ...] = ()
    """(3, H, W) in 0 to 1, what each ControlNet of the request is shown."""

    @classmethod
    def prepare(cls, request: ImageRequest, vae: Vae, *, is_masked_shown: bool) -> "Canvas":
        """Bring a request's pictures to their size, and encode them.

        Args:
            is_masked_shown: whether the denoiser is shown the picture without what is to be made.

        Raises:
            NetworkFailed: the encoder failed.
        """
        size = (request.width, request.height)
        controls = tuple(pictures.to_unit(control.image, size) for control in request.controls)
        start = request.start
        if start is None:
            return cls(controls=controls)
        mask = None if start.mask is None else pictures.to_mask(start.mask, size)
        # The nearest pixel up and left, as PyTorch's interpolation takes it.
        factor = vae.scale_factor
        small_mask = None if mask is None else mask[:, ::factor, ::factor].copy()
        if start.picture is None:
            return cls(image=start.latents, mask=small_mask, controls=controls)
        pixels = 2 * pictures.to_unit(start.picture, size) - 1
        image, masked = vae.encode(pixels), None
        if mask is not None and is_masked_shown:
            masked = vae.encode(pixels * (mask < 0.5))
        return cls(image=image, mask=small_mask, masked=masked, controls=controls)
