"""Pictures in train/<class>/ and test/<class>/ of a folder, decoded by pillow."""

import hashlib
from pathlib import Path

import numpy as np

from fashion_ddp.distributed import machine
from fashion_ddp.errors import UserError

ENDINGS = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
GREY = {"1", "L", "LA"}  # pillow's modes
UNREADABLE = (OSError, EOFError, ValueError, SyntaxError)


def read(folder: Path) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray], list[str]]:
    """Training images and labels, test images and labels, the names of the classes.

    Raises UserError for what cannot be read, has another size than the rest, or does not fit into memory.
    """
    classes = sorted(_folders(folder / "train"))
    if unknown := sorted(set(_folders(folder / "test")) - set(classes)):
        raise UserError(f"dataset {folder}: class {unknown[0]!r} has a folder in test/ and none in train/: add it")
    paths, labels = zip(*(_paths(folder / part, classes) for part in ("train", "test")), strict=True)
    shape = _shape(folder, [path for part in paths for path in part])
    count = sum(map(len, paths)) * int(np.prod(shape))
    machine.require_memory(
        f"dataset {folder}, decoded,", count * machine.read_placement().local_world_size, machine.free_memory()
    )
    train, test = (_decode(part, shape) for part in paths)
    return (train, labels[0]), (test, labels[1]), classes


def _folders(folder: Path) -> list[str]:
    try:
        return [path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror}): it must hold a folder for each class") from None


def _paths(folder: Path, classes: list[str]) -> tuple[list[Path], np.ndarray]:
    """The pictures below a folder, and their labels, in an order that is the same everywhere and mixes the classes: a
    recipe may take the images as they come. (By the md5 of their names.)"""
    found = []
    for label, name in enumerate(classes):
        for path in (folder / name).rglob("*"):
            if path.suffix.lower() in ENDINGS and not path.name.startswith(".") and path.is_file():
                key = path.relative_to(folder).as_posix().encode(errors="surrogateescape")
                found.append((hashlib.md5(key, usedforsecurity=False).digest(), key, path, label))
    found.sort(key=lambda one: one[:2])
    return [path for *_, path, _ in found], np.array([label for *_, label in found], np.int64)


def _shape(folder: Path, paths: list[Path]) -> tuple[int, int, int]:
    """(C, H, W) of the pictures: one channel where all are grey, else three."""
    from PIL import Image  # takes a while, for those who have no pictures

    sizes: dict[tuple[int, int], Path] = {}
    grey = True
    for path in paths:
        try:
            with Image.open(path) as picture:
                size, mode = picture.size, picture.mode
        except UNREADABLE as error:
            raise UserError(f"{path}: cannot be read as a picture ({error}): mend or remove it") from None
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
            raise UserError(f"{path}: cannot be read as a picture ({error}): mend or remove it") from None
        image[:] = pixels.reshape(*shape[1:], shape[0]).transpose(2, 0, 1)
    return images
