"""Decode a picture of any format, mode and size, the same way for training and for predictions."""

import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

# It warns of files that are unusual and yet readable, in the midst of whatever is said.
warnings.filterwarnings("ignore", module=r"PIL\.")

# What Pillow raises for a file that is no picture, is cut off, damaged, or absurdly large.
UNREADABLE: tuple[type[Exception], ...] = (OSError, EOFError, ValueError, SyntaxError, TypeError, LookupError)
UNREADABLE += (ArithmeticError, struct.error, zlib.error, Image.DecompressionBombError)
DEEP = ("I", "F")  # how Pillow's modes of more than 8 bits begin
ORIENTATION = 0x0112  # EXIF's number for it


def is_grey(mode: str) -> bool:
    """Return whether a picture of one of Pillow's modes has no colours."""
    return mode in ("1", "L", "LA", "La") or mode.startswith(DEEP)


def look(path: Path) -> tuple[bool, tuple[int, int]]:
    """Return whether a picture has no colours, and its width and height when it is upright. It is not decoded.

    Raises one of UNREADABLE.
    """
    with Image.open(path) as file:
        width, height = file.size
        turned = file.getexif().get(ORIENTATION, 1) >= 5  # lies on its side
        return is_grey(file.mode), (height, width) if turned else (width, height)


def load(path: Path, shape: tuple[int, int, int]) -> np.ndarray:
    """Return a picture's pixels, uint8 [C, H, W] of this shape. One of another size is scaled to a square, by its
    shorter side, and cut off. Raises one of UNREADABLE."""
    channels, height, width = shape
    image = read(path, height if height == width else 0)
    if image.size != (width, height):
        image = centre_square(image, height)
    return pixels(image.convert("L" if channels == 1 else "RGB"))


def read(path: Path, side: int = 0) -> Image.Image:
    """Read a picture: upright, as L or RGB, its transparent parts white, more than 8 bits brought to 8.

    `side`: how many pixels of the shorter side are needed, 0 for all; a JPEG of many more is decoded at a fraction of
    its size, which takes a fraction of the time. Raises one of UNREADABLE.
    """
    with Image.open(path) as file:
        if side:
            file.draft(None, (2 * side, 2 * side))  # twice, so that what scales it down has something to average
        image = ImageOps.exif_transpose(file)
    mode = "L" if is_grey(image.mode) else "RGB"
    if image.mode.startswith(DEEP):
        image = Image.fromarray(_to_8_bits(image))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)


def _to_8_bits(image: Image.Image) -> np.ndarray:
    """Return the pixels uint8 [H, W] of a picture of more bits. Those of 16 bits are divided; of others the brightest
    pixel is 255, if it is brighter than that."""
    values = np.asarray(image, dtype=np.float64).clip(min=0)
    scale = 1 / 257 if image.mode.startswith("I;16") else 255 / max(values.max(initial=0), 255)
    return (values * scale).round().clip(max=255).astype(np.uint8)


def centre_square(image: Image.Image, side: int) -> Image.Image:
    """Scale a picture, with antialiasing, so that its shorter side is `side`, and keep the square at its centre."""
    short = min(image.size)
    left, top = ((length - short) / 2 for length in image.size)
    return image.resize((side, side), Image.Resampling.BILINEAR, (left, top, left + short, top + short))


def pixels(image: Image.Image) -> np.ndarray:
    """Return a picture's pixels, uint8 [C, H, W]."""
    array = np.asarray(image)
    return np.ascontiguousarray(np.moveaxis(array.reshape(*array.shape[:2], -1), 2, 0))
