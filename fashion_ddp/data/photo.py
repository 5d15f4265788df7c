"""A user's picture as a model's data looks, and a picture of what the model made of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError

from fashion_ddp.errors import UserError

DARK = 64  # of 255: the background of data whose corners are darker than this, most often, is dark
CLOSE = 0.05 * 255  # to the background: belongs to it


@dataclass(frozen=True, eq=False)
class Seen:
    """A picture as a model sees it."""

    path: Path
    given: Image.Image  # small, to be shown
    pixels: np.ndarray  # uint8 [C, H, W]


def background(image: np.ndarray) -> float:
    """The median of the four corners of an image [C, H, W], each the median of a square of a twentieth of
    the shorter side.

    No image of Fashion-MNIST has one above 127.
    """
    _, height, width = image.shape
    side = max(1, min(height, width) // 20)
    ends = slice(side), slice(-side, None)
    return float(np.median([np.median(image[:, rows, columns]) for rows in ends for columns in ends]))


def is_light_on_dark(samples: np.ndarray) -> bool:
    """Whether images [n, C, H, W] of a data set show light things on a dark background."""
    return float(np.median([background(image) for image in samples])) < DARK


def see(path: Path, shape: tuple[int, int, int], light_on_dark: bool) -> Seen:
    """A picture of any size and colour as pixels of the data's shape (C, H, W).

    Of data with things on a dark background: a light background is inverted and the picture made as Fashion-MNIST's
    were, trimmed to the thing, its longest edge brought to the data's, and centred (Xiao et al., arXiv 1708.07747,
    section 2; it is scaled by averaging, not by leaving rows out); the brightest pixel of nearly every one of those is
    254 or 255. Of other data: scaled and cropped about its centre. A picture of the data's own size keeps its pixels,
    inverted at most.

    Raises UserError for a file that cannot be read as a picture.
    """
    channels, height, width = shape
    image = _read(path)
    given = ImageOps.contain(image, (SIDE, SIDE))
    image = image.convert("L" if channels == 1 else "RGB")
    own_size = image.size == (width, height)
    if not light_on_dark:
        image = image if own_size else ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
        return Seen(path, given, _pixels(image))
    pixels = _pixels(image)
    pixels = 255 - pixels if background(pixels) > 127 else pixels
    if not own_size:
        ground = background(pixels)
        thing = np.abs(pixels - ground).max(axis=0) > CLOSE
        lifted = np.where(thing, (pixels - ground).clip(min=0), 0)
        pixels = _centred(_trimmed(lifted, thing), height, width)
    return Seen(path, given, pixels)


def _read(path: Path) -> Image.Image:
    """A picture, upright, in RGB; what is transparent in it is white."""
    if path.is_dir():
        raise UserError(f"{path} is a folder: name pictures, as {path}/*.png")
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode.startswith(("I", "F")):  # more than 8 bits
                values = np.asarray(image, dtype=np.float64)
                image = Image.fromarray((values.clip(min=0) * (255 / max(values.max(), 255))).astype(np.uint8))
            image = image.convert("RGBA")
    except UnidentifiedImageError:
        raise UserError(f"{path} is no picture, or of a kind that Pillow cannot read") from None
    except (OSError, Image.DecompressionBombError, SyntaxError, ValueError) as error:
        raise UserError(f"{path} cannot be read as a picture: {getattr(error, 'strerror', None) or error}") from None
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _pixels(image: Image.Image) -> np.ndarray:
    """uint8 [C, H, W]"""
    array = np.asarray(image)
    return np.ascontiguousarray(np.moveaxis(array.reshape(*array.shape[:2], -1), 2, 0))


def _trimmed(image: np.ndarray, thing: np.ndarray) -> np.ndarray:
    """The part of an image [C, H, W] that holds all of where `thing` [H, W] is true; all of it where nothing is."""
    rows, columns = np.flatnonzero(thing.any(axis=1)), np.flatnonzero(thing.any(axis=0))
    if not len(rows):
        return image
    return image[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _centred(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """An image [C, h, w] scaled to fit, in the middle of black, its brightest pixel 255: uint8 [C, height, width]."""
    _, h, w = image.shape
    scale = min(height / h, width / w)
    h, w = (max(1, round(side * scale)) for side in (h, w))
    layers = [Image.fromarray(layer.astype(np.float32)).resize((w, h), Image.Resampling.LANCZOS) for layer in image]
    whole = np.zeros((len(image), height, width), np.uint8)
    top, left = (height - h) // 2, (width - w) // 2
    scaled = np.stack([np.asarray(layer) for layer in layers]).clip(min=0)
    whole[:, top : top + h, left : left + w] = (scaled * (255 / max(scaled.max(), 1))).round()
    return whole


# --- What it made of it -----------------------------------------------------------------------------------------

SIDE, EDGE = 196, 16  # pixels
INK, BAR, QUIET = (30, 30, 30), (0, 114, 178), (200, 200, 200)


def card(seen: Seen, top: Sequence[tuple[str, float]]) -> Image.Image:
    """The picture as it was given, as the model saw it, and the likeliest classes with their probabilities."""
    left, middle, right = EDGE, 2 * EDGE + SIDE, 3 * EDGE + 2 * SIDE
    whole = Image.new("RGB", (right + 300 + EDGE, SIDE + 3 * EDGE + 8), "white")
    draw, font = ImageDraw.Draw(whole), ImageFont.load_default(size=15)
    below = 2 * EDGE + 8
    pixels = np.moveaxis(seen.pixels, 0, 2)
    saw = ImageOps.contain(Image.fromarray(pixels.squeeze()).convert("RGB"), (SIDE, SIDE), Image.Resampling.NEAREST)
    for x, title, image in ((left, "given", seen.given), (middle, "what the model saw", saw)):
        draw.text((x, EDGE // 2), title, INK, font)
        whole.paste(image, (x, below))
        draw.rectangle((x - 1, below - 1, x + image.width, below + image.height), outline=QUIET)
    for place, (name, probability) in enumerate(top):
        y = below + place * SIDE // 3
        draw.text((right, y), f"{name}  {100 * probability:.1f} %", INK, font)
        draw.rectangle((right, y + 24, right + 300, y + 40), outline=QUIET)
        draw.rectangle((right, y + 24, right + round(300 * probability), y + 40), fill=BAR)
    return whole


def save_beside(image: Image.Image, path: Path) -> Path:
    """Save a picture under a name that nothing has: `path`, or <stem>.1.png ... Returns the name."""
    taken = 0
    while True:
        name = path.with_name(f"{path.stem}.{taken}.png") if taken else path.with_name(f"{path.stem}.png")
        try:
            with open(name, "xb") as file:
                image.save(file, format="PNG")
            return name
        except FileExistsError:
            taken += 1
