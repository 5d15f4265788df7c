"""Prepare a user's picture for a model, and draw what the model made of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError

from fashion_ddp.data import cache, picture
from fashion_ddp.errors import UserError

DARK = 64  # of 255: below it a background is dark
CLOSE = 0.05 * 255  # pixels that differ less than this from the background belong to it


@dataclass(frozen=True, eq=False)
class Photo:
    """A user's picture, and what the model sees of it."""

    path: Path
    original: Image.Image  # scaled down, for drawing
    pixels: np.ndarray  # uint8 [C, H, W], for the model


def background_brightness(image: np.ndarray) -> float:
    """Return the brightness, 0 to 255, of the background of an image [C, H, W].

    It is the median over the four corners, each the median of a square with a side of a twentieth of the shorter side.
    No image of Fashion-MNIST has one above 127.
    """
    _, height, width = image.shape
    side = max(1, min(height, width) // 20)
    ends = slice(side), slice(-side, None)
    return float(np.median([np.median(image[:, rows, columns]) for rows in ends for columns in ends]))


def is_light_on_dark(samples: np.ndarray) -> bool:
    """Return whether images [n, C, H, W] of a dataset show light things on a dark background, by their median."""
    return float(np.median([background_brightness(image) for image in samples])) < DARK


def prepare_photo(path: Path, shape: tuple[int, int, int], light_on_dark: bool, image_size: int = 0) -> Photo:
    """Read a picture of any size and colour, and convert it to the shape (C, H, W) of a model's training data.

    If that data is light on dark, a picture with a light background is inverted. Then it is made as Fashion-MNIST was
    (Xiao et al., arXiv 1708.07747, section 2): trimmed to the thing, scaled to fit, centred, and brightened so that its
    brightest pixel is 255, as in nearly every image there it is 254 or 255. (It is scaled by averaging, not by leaving
    rows out.) For other data, it is scaled and cropped around its centre; a run with `image_size` sees it as it saw the
    test set's. A picture that already has the data's size keeps its pixels, inverted at most.

    Raises UserError for a file that cannot be read as a picture.
    """
    channels, height, width = shape
    image = _read(path)
    original = ImageOps.contain(image, (SIDE, SIDE))
    image = image.convert("L" if channels == 1 else "RGB")
    own_size = image.size == (width, height)
    if image_size and not light_on_dark:
        side = cache.stored_side(image_size)
        return Photo(path, original, cache.centre(picture.load(path, (channels, side, side)), image_size))
    if not light_on_dark:
        image = image if own_size else ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
        return Photo(path, original, picture.pixels(image))
    pixels = picture.pixels(image)
    pixels = 255 - pixels if background_brightness(pixels) > 127 else pixels
    if not own_size:
        ground = background_brightness(pixels)
        thing = np.abs(pixels - ground).max(axis=0) > CLOSE
        lifted = np.where(thing, (pixels - ground).clip(min=0), 0)
        pixels = _centre(_trim(lifted, thing), height, width)
    return Photo(path, original, pixels)


def _read(path: Path) -> Image.Image:
    """Read a picture as RGB. Raises UserError for a file that is none."""
    if path.is_dir():
        raise UserError(f"{path} is a folder: name pictures, as {path}/*.png")
    try:
        return picture.read(path).convert("RGB")
    except UnidentifiedImageError:
        raise UserError(f"{path} is no picture, or of a kind that Pillow cannot read") from None
    except picture.UNREADABLE as error:
        raise UserError(f"{path} cannot be read as a picture: {getattr(error, 'strerror', None) or error}") from None


def _trim(image: np.ndarray, thing: np.ndarray) -> np.ndarray:
    """Cut an image [C, H, W] to the smallest part with all pixels where `thing` [H, W] is true, if any is."""
    rows, columns = np.flatnonzero(thing.any(axis=1)), np.flatnonzero(thing.any(axis=0))
    if not len(rows):
        return image
    return image[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _centre(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Scale an image [C, h, w] to fit into uint8 [C, height, width], centred on black, its brightest pixel 255."""
    _, h, w = image.shape
    scale = min(height / h, width / w)
    h, w = (max(1, round(side * scale)) for side in (h, w))
    layers = [Image.fromarray(layer.astype(np.float32)).resize((w, h), Image.Resampling.LANCZOS) for layer in image]
    whole = np.zeros((len(image), height, width), np.uint8)
    top, left = (height - h) // 2, (width - w) // 2
    scaled = np.stack([np.asarray(layer) for layer in layers]).clip(min=0)
    whole[:, top : top + h, left : left + w] = (scaled * (255 / max(scaled.max(), 1))).round()
    return whole


# --- What the model made of it ----------------------------------------------------------------------------------

SIDE, EDGE = 196, 16  # pixels
INK, BAR, QUIET = (30, 30, 30), (0, 114, 178), (200, 200, 200)


def draw_card(photo: Photo, top: Sequence[tuple[str, float]]) -> Image.Image:
    """Draw the original picture, what the model saw, and the likeliest classes with their probabilities."""
    left, middle, right = EDGE, 2 * EDGE + SIDE, 3 * EDGE + 2 * SIDE
    whole = Image.new("RGB", (right + 300 + EDGE, SIDE + 3 * EDGE + 8), "white")
    draw, font = ImageDraw.Draw(whole), ImageFont.load_default(size=15)
    below = 2 * EDGE + 8
    pixels = np.moveaxis(photo.pixels, 0, 2)
    saw = ImageOps.contain(Image.fromarray(pixels.squeeze()).convert("RGB"), (SIDE, SIDE), Image.Resampling.NEAREST)
    for x, title, image in ((left, "given", photo.original), (middle, "what the model saw", saw)):
        draw.text((x, EDGE // 2), title, INK, font)
        whole.paste(image, (x, below))
        draw.rectangle((x - 1, below - 1, x + image.width, below + image.height), outline=QUIET)
    for n, (name, probability) in enumerate(top):
        y = below + n * SIDE // 3
        draw.text((right, y), f"{name}  {100 * probability:.1f} %", INK, font)
        draw.rectangle((right, y + 24, right + 300, y + 40), outline=QUIET)
        draw.rectangle((right, y + 24, right + round(300 * probability), y + 40), fill=BAR)
    return whole


def save_without_replacing(image: Image.Image, path: Path) -> Path:
    """Save a picture as <stem>.png, or as <stem>.1.png and so on if that exists. Return the new file's path."""
    number = 0
    while True:
        free = path.with_name(f"{path.stem}.{number}.png") if number else path.with_name(f"{path.stem}.png")
        try:
            with open(free, "xb") as file:
                image.save(file, format="PNG")
            return free
        except FileExistsError:
            number += 1
