"""Read a dataset from pictures in train/<class>/ and test/<class>/ of a folder, with pillow."""

import hashlib
from pathlib import Path

import numpy as np

from fashion_ddp.distributed import machine
from fashion_ddp.errors import UserError

ENDINGS = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
GREY = {"1", "L", "LA"}  # pillow's modes
UNREADABLE = (OSError, EOFError, ValueError, SyntaxError)


def read(folder: Path) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray], list[str]]:
    """Return training images and labels, test images and labels, and the names of the classes.

    Images are uint8 [N, C, H, W], labels int64 [N]. Raises UserError for a picture that cannot be read or has another
    size than the others, and where all together do not fit into memory.
    """
    classes = sorted(_class_names(folder / "train"))
    if unknown := sorted(set(_class_names(folder / "test")) - set(classes)):
        raise UserError(f"dataset {folder}: class {unknown[0]!r} has a folder in test/ and none in train/: add it")
    paths, labels = zip(*(_find_pictures(folder / part, classes) for part in ("train", "test")), strict=True)
    shape = _common_shape(folder, [path for part in paths for path in part])
    count = sum(map(len, paths)) * int(np.prod(shape))
    machine.require_memory(
        f"dataset {folder}, decoded,", count * machine.read_placement().local_world_size, machine.free_memory()
    )
    train, test = (_decode(part, shape) for part in paths)
    return (train, labels[0]), (test, labels[1]), classes


def _class_names(folder: Path) -> list[str]:
    try:
        return [path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror}): it must hold a folder for each class") from None


def _find_pictures(folder: Path, classes: list[str]) -> tuple[list[Path], np.ndarray]:
    """Return the pictures below a folder and their labels int64 [N], ordered by the md5 of their names.

    This order is the same on every machine and mixes the classes, which a recipe without shuffling needs.
    """
    found = []
    for label, name in enumerate(classes):
        for path in (folder / name).rglob("*"):
            if path.suffix.lower() in ENDINGS and not path.name.startswith(".") and path.is_file():
                key = path.relative_to(folder).as_posix().encode(errors="surrogateescape")
                found.append((hashlib.md5(key, usedforsecurity=False).digest(), key, path, label))
    found.sort(key=lambda one: one[:2])
    return [path for *_, path, _ in found], np.array([label for *_, label in found], np.int64)


def _common_shape(folder: Path, paths: list[Path]) -> tuple[int, int, int]:
    """Return (C, H, W) of the pictures: one channel if all are grey, else three. Raises UserError for unlike sizes."""
    from PIL import Image  # not at the top: it takes a while to import, and only this dataset needs it

    sizes: dict[tuple[int, int], Path] = {}
    grey = True
    for path in paths:
        try:
            with Image.open(path) as picture:
                size, mode = picture.size, picture.mode
        except UNREADABLE as error:
            raise UserError(f"{path}: cannot be read as a picture ({error}): repair or remove it") from None
        if mode.startswith(("I", "F")):
            raise UserError(f"{path}: has pixels of more than 8 bits ({mode}): save it with 8 bits per channel")
        grey = grey and mode in GREY
        sizes.setdefault(size, path)
        if len(sizes) > 1:
            (one, first), (other, path) = sizes.items()
            raise UserError(
                f"dataset {folder}: pictures must be of one size; {first} is {one[0]}x{one[1]} and {path} is "
                f"{other[0]}x{other[1]} (width x height): bring all to one, as with "
                f"`mogrify -resize {one[0]}x{one[1]}! FILES` on a copy of them"
            )
    if not sizes:
        raise UserError(f"dataset {folder}: no pictures in train/<class>/ and test/<class>/: put some there")
    [(width, height)] = sizes
    return 1 if grey else 3, height, width


def _decode(paths: list[Path], shape: tuple[int, int, int]) -> np.ndarray:
    from PIL import Image

    images = np.empty((len(paths), *shape), np.uint8)
    for image, path in zip(images, paths, strict=True):
        try:
            with Image.open(path) as picture:
                pixels = np.asarray(picture.convert("L" if shape[0] == 1 else "RGB"))
        except UNREADABLE as error:
            raise UserError(f"{path}: cannot be read as a picture ({error}): repair or remove it") from None
        image[:] = pixels.reshape(*shape[1:], shape[0]).transpose(2, 0, 1)
    return images
