"""Pictures as numbers."""

import numpy as np
from PIL import Image


def levels(picture: Image.Image) -> np.ndarray:
    """Of 0 to 255, with a sign, so that two pictures can be subtracted."""
    return np.asarray(picture).astype(int)
