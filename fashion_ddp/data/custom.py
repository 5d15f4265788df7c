"""A dataset of the user's own: what lies in a folder or an .npz file, or what a function returns.

    ./mine            train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-..., t10k-labels-... (or test-...),
                      each plain or .gz, of whatever size, count and number of classes; their names, one per line, in
                      classes.txt, else they are numbers
    ./mine            train/<class>/*.png and test/<class>/*.png (any format that pillow reads), all of one size
    ./mine.npz        train_images, train_labels, test_images, test_labels (or x_train, y_train, x_test, y_test), and
                      classes, if they are to have names
    package.module:f  f() returns (train_images, train_labels), (test_images, test_labels), names of the classes

Images are uint8 [N, C, H, W]; [N, H, W] and [N, H, W, C] with 1 or 3 channels are understood. Labels are whole numbers
from 0.
"""

import gzip
import hashlib
import re
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fashion_ddp import user_code
from fashion_ddp.config.names import is_code
from fashion_ddp.data import idx, image_folder
from fashion_ddp.errors import UserError

PARTS = ("train", "test")
NPZ = [("train_images", "train_labels", "test_images", "test_labels"), ("x_train", "y_train", "x_test", "y_test")]
UNREADABLE = (OSError, EOFError, ValueError, zlib.error, zipfile.BadZipFile)


class Found(NamedTuple):
    """What lay there, not yet checked."""

    train: tuple[Any, Any]  # images, labels
    test: tuple[Any, Any]
    classes: Sequence[str] | None


def load(dataset: str) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """The arrays of a Dataset by name, and the names of the classes. Raises UserError for what cannot be trained on."""
    if is_code(dataset):
        return _checked(dataset, _call(dataset))
    path = Path(dataset)
    if path.is_dir():
        return _checked(dataset, Found(*image_folder.read(path)) if (path / "train").is_dir() else _idx_files(path))
    if not path.is_file():
        raise UserError(f"dataset {dataset}: there is no such folder or file (looked for at {path.absolute()})")
    return _checked(dataset, _npz(path))


def md5(arrays: dict[str, np.ndarray], classes: tuple[str, ...]) -> dict[str, str]:
    """Of each array's shape and bytes, and of the names."""
    found = {}
    for name, array in arrays.items():
        digest = hashlib.md5(str(array.shape).encode(), usedforsecurity=False)
        digest.update(array.data)
        found[name] = digest.hexdigest()
    names = hashlib.md5("\n".join(classes).encode(errors="surrogateescape"), usedforsecurity=False)
    return found | {"classes": names.hexdigest()}


def _call(dataset: str) -> Found:
    function = user_code.load(dataset, "dataset")
    shape = "it must return (train_images, train_labels), (test_images, test_labels), names of the classes"
    try:
        train, test, classes = function()
        (train_images, train_labels), (test_images, test_labels) = train, test
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"dataset {dataset}: calling it: {user_code.describe_error(error)}; {shape}") from error
    return Found((train_images, train_labels), (test_images, test_labels), classes)


def _npz(path: Path) -> Found:
    try:
        with np.load(path) as file:
            held = {name: file[name] for name in file.files}
    except UNREADABLE as error:
        raise UserError(
            f"dataset {path}: cannot be read as .npz: {error}: write it with np.savez, no objects"
        ) from None
    names = next((names for names in NPZ if held.keys() >= set(names)), None)
    if names is None:
        raise UserError(
            f"dataset {path}: needs the arrays {', '.join(NPZ[0])}, found {', '.join(held) or 'none'}: name them so in "
            "np.savez"
        )
    images, labels, test_images, test_labels = (held[name] for name in names)
    classes = held["classes"].ravel().tolist() if "classes" in held else None
    return Found((images, labels), (test_images, test_labels), classes)


def _idx_files(folder: Path) -> Found:
    names = [path.name for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith(".")]
    arrays = []
    for part in ("train", "t10k|test"):
        for kind, axes in (("images", (3, 4)), ("labels", (1,))):
            pattern = rf"({part}).*{kind}.*(idx|ubyte)"
            found = sorted({name.removesuffix(".gz") for name in names if re.search(pattern, name)})
            if len(found) != 1:
                what = f"{'train' if part == 'train' else 't10k'}-{kind}-idx{axes[0]}-ubyte(.gz)"
                raise UserError(
                    f"dataset {folder}: needs one file {what}, found {', '.join(found) or 'none'}; or pictures in "
                    "train/<class>/ and test/<class>/"
                )
            path = folder / (f"{found[0]}.gz" if f"{found[0]}.gz" in names else found[0])
            try:
                content = path.read_bytes()
                arrays.append(idx.decode(gzip.decompress(content) if path.suffix == ".gz" else content, *axes))
            except UNREADABLE as error:
                raise UserError(f"{path}: cannot be read as an idx file: {error}: write it anew") from None
    images, labels, test_images, test_labels = arrays
    return Found((images, labels), (test_images, test_labels), _named_classes(folder / "classes.txt"))


def _named_classes(path: Path) -> list[str] | None:
    try:
        lines = path.read_text().splitlines() if path.is_file() else None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}: write it anew, one name per line") from None
    return [line.strip() for line in lines if line.strip()] if lines else None


def _checked(dataset: str, found: Found) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    train = _images_and_labels(dataset, "train", *found.train)
    test = _images_and_labels(dataset, "test", *found.test)
    shapes = [images.shape[1:] for images, _ in (train, test)]
    if shapes[0] != shapes[1]:
        raise UserError(f"dataset {dataset}: test images are {shapes[1]}, training images {shapes[0]}: make them alike")
    names = range(int(train[1].max()) + 1) if found.classes is None else found.classes
    classes = tuple(map(str, names))
    for part, (_, labels) in zip(PARTS, (train, test), strict=True):
        low, high, present = int(labels.min()), int(labels.max()), set(labels.tolist())
        if low < 0 or high >= len(classes):
            wrong = low if low < 0 else high
            raise UserError(
                f"dataset {dataset}: {part} labels must be from 0 to {len(classes) - 1}, one number for each of "
                f"{len(classes)} classes, found {wrong}: correct the labels, or name all classes"
            )
        missing = [name for label, name in enumerate(classes) if label not in present]
        if missing:
            few = ", ".join(map(repr, missing[:5])) + (" ..." if len(missing) > 5 else "")
            raise UserError(
                f"dataset {dataset}: no {part} image of class {few}: add some, or leave the class out of train and "
                "test (labels count from 0)"
            )
    if len(classes) < 2:
        raise UserError(f"dataset {dataset}: has one class, {classes[0]!r}: there is nothing to tell apart")
    arrays = {"train_images": train[0], "train_labels": train[1], "test_images": test[0], "test_labels": test[1]}
    return arrays, classes


def _images_and_labels(dataset: str, part: str, images: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [N, C, H, W] and int64 [N], writable, or a UserError."""
    where = f"dataset {dataset}: {part}"
    images, labels = np.asarray(images), np.asarray(labels)
    if images.dtype != np.uint8:
        raise UserError(f"{where} images must be uint8 from 0 to 255, found {images.dtype}: convert them")
    if images.ndim == 3:
        images = images[:, None]
    if images.ndim == 4 and images.shape[1] not in (1, 3) and images.shape[3] in (1, 3):
        images = images.transpose(0, 3, 1, 2)
    if images.ndim != 4 or 0 in images.shape[1:]:
        raise UserError(f"{where} images must be [N, C, H, W], found {list(images.shape)}: reshape them")
    if labels.shape not in ((len(images),), (len(images), 1)) or labels.dtype.kind not in "iu":
        raise UserError(
            f"{where} labels must be {len(images):,} whole numbers, one per image, found {labels.dtype} "
            f"{list(labels.shape)}: correct them"
        )
    if not len(images):
        raise UserError(f"{where} set is empty: add images")
    # torch warns of memory that it must not write.
    return np.require(images, requirements=["C", "W"]), np.require(labels.reshape(-1), np.int64, ["C", "W"])
