"""Make an image a picture that is small enough for a report or a dashboard."""

import numpy as np
from PIL import Image

LARGEST = 64  # pixels of a side


def thumbnail(image: np.ndarray, largest: int = LARGEST) -> Image.Image:
    """Return an image uint8 [C, H, W] as a picture, in colour if it has three channels, else of its first; one with a
    longer side than `largest` is scaled down."""
    picture = Image.fromarray(np.moveaxis(image, 0, 2) if len(image) == 3 else image[0])
    picture.thumbnail((largest, largest), Image.Resampling.LANCZOS)
    return picture
