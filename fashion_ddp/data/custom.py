"""Read a dataset of the user's own: from a folder, from an .npz file, or from a function.

    ./mine            train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-..., t10k-labels-... (or test-...),
                      each plain or .gz, of any image size, count and number of classes. classes.txt may name the
                      classes, one per line
    ./mine            train/<class>/*.jpg and test/<class>/*.jpg, val/<class>/*.jpg, or both, of any format that Pillow
                      reads (image_folder.py, cache.py)
    ./mine.npz        train_images, train_labels, test_images, test_labels (or x_train, y_train, x_test, y_test), and
                      optionally classes: their names
    package.module:f  f() returns (train_images, train_labels), (test_images, test_labels), names of the classes

Images are uint8 [N, C, H, W]; [N, H, W], and [N, H, W, C] with 1 or 3 channels, are accepted, too. Labels are whole
numbers from 0. Classes without names are called by their numbers.
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
from fashion_ddp.config.names import is_code, is_path
from fashion_ddp.data import cache, idx
from fashion_ddp.data.cache import PictureSettings
from fashion_ddp.distributed import machine
from fashion_ddp.errors import UserError

NPZ = [("train_images", "train_labels", "test_images", "test_labels"), ("x_train", "y_train", "x_test", "y_test")]
UNREADABLE = (OSError, EOFError, ValueError, zlib.error, zipfile.BadZipFile)


class RawData(NamedTuple):
    """Arrays and names as the user gave them, not yet checked."""

    train: tuple[Any, Any]  # images, labels
    test: tuple[Any, Any]
    classes: Sequence[str] | None


def has_pictures(dataset: str) -> bool:
    """Return whether a dataset is a folder of pictures, which are decoded into a cache."""
    return is_path(dataset) and (Path(dataset) / "train").is_dir()


def load(dataset: str) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Return the arrays of a Dataset by name, and the names of the classes.

    Raises UserError for data that is missing, cannot be read, or that a model cannot be trained on.
    """
    if is_code(dataset):
        return _check_arrays(dataset, _call_function(dataset))
    path = Path(dataset)
    if path.is_dir():
        return _check_arrays(dataset, _read_idx_files(path))
    if not path.is_file():
        raise UserError(f"dataset {dataset}: there is no such folder or file (looked for at {path.absolute()})")
    return _check_arrays(dataset, _read_npz(path))


def load_pictures(dataset: str, settings: PictureSettings, made: Path | None = None) -> cache.Pictures:
    """Return the pictures of a folder, decoded. `made`: their cache, where it is known to be ready.

    Raises UserError for pictures that are missing, cannot be read, or that a model cannot be trained on.
    """
    pictures = cache.load(made or cache.prepare(Path(dataset), settings))
    for part, labels in pictures.labels.items():
        if not len(labels):
            raise UserError(f"dataset {dataset}: {part} set is empty: add images")
    _check_labels(dataset, pictures.labels, pictures.classes)
    return pictures


def array_hashes(arrays: dict[str, np.ndarray], classes: tuple[str, ...]) -> dict[str, str]:
    """Return the md5 of each array's shape and bytes, and of the classes' names."""
    hashes = {}
    for name, array in arrays.items():
        digest = hashlib.md5(str(array.shape).encode(), usedforsecurity=False)
        digest.update(array.data)
        hashes[name] = digest.hexdigest()
    names = hashlib.md5("\n".join(classes).encode(errors="surrogateescape"), usedforsecurity=False)
    return hashes | {"classes": names.hexdigest()}


def _call_function(dataset: str) -> RawData:
    function = user_code.load(dataset, "dataset")
    shape = "it must return (train_images, train_labels), (test_images, test_labels), names of the classes"
    try:
        train, test, classes = function()
        (train_images, train_labels), (test_images, test_labels) = train, test
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"dataset {dataset}: calling it: {user_code.describe_error(error)}; {shape}") from error
    return RawData((train_images, train_labels), (test_images, test_labels), classes)


def _require_memory(dataset: Path, nbytes: int) -> None:
    """Raise UserError where the machine's ranks, of which each reads a set of its own, have no memory for it."""
    ranks = machine.ranks_here()
    what = f"dataset {dataset}, decoded{f' by {ranks} ranks' if ranks > 1 else ''},"
    way_on = "take fewer or smaller images, or fewer ranks; only pictures in train/<class>/ need not fit into memory"
    machine.require_memory(what, ranks * nbytes, machine.free_memory(), way_on=way_on)


def _read_npz(path: Path) -> RawData:
    try:
        with zipfile.ZipFile(path) as archive:
            _require_memory(path, sum(array.file_size for array in archive.infolist()))
        with np.load(path) as file:
            arrays = {name: file[name] for name in file.files}
    except UNREADABLE as error:
        raise UserError(
            f"dataset {path}: cannot be read as .npz: {error}: write it with np.savez, no objects"
        ) from None
    names = next((names for names in NPZ if arrays.keys() >= set(names)), None)
    if names is None:
        raise UserError(
            f"dataset {path}: needs the arrays {', '.join(NPZ[0])}, found {', '.join(arrays) or 'none'}: name them so "
            "in np.savez"
        )
    images, labels, test_images, test_labels = (arrays[name] for name in names)
    classes = arrays["classes"].ravel().tolist() if "classes" in arrays else None
    return RawData((images, labels), (test_images, test_labels), classes)


def _read_idx_files(folder: Path) -> RawData:
    names = [path.name for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith(".")]
    files: list[tuple[Path, tuple[int, ...]]] = []
    for part in ("train", "t10k|test"):
        for kind, axes in (("images", (3, 4)), ("labels", (1,))):
            pattern = rf"({part}).*{kind}.*(idx|ubyte)"
            matches = sorted({name.removesuffix(".gz") for name in names if re.search(pattern, name)})
            if len(matches) != 1:
                what = f"{'train' if part == 'train' else 't10k'}-{kind}-idx{axes[0]}-ubyte(.gz)"
                raise UserError(
                    f"dataset {folder}: needs one file {what}, found {', '.join(matches) or 'none'}; or pictures in "
                    "train/<class>/ and test/<class>/"
                )
            files.append((folder / (f"{matches[0]}.gz" if f"{matches[0]}.gz" in names else matches[0]), axes))
    _require_memory(folder, sum(_idx_size(path) for path, _ in files))
    arrays = []
    for path, accepted in files:
        try:
            content = path.read_bytes()
            arrays.append(idx.decode(gzip.decompress(content) if path.suffix == ".gz" else content, *accepted))
        except UNREADABLE as error:
            raise UserError(f"{path}: cannot be read as an idx file: {error}: write it again") from None
    images, labels, test_images, test_labels = arrays
    return RawData((images, labels), (test_images, test_labels), _read_class_names(folder / "classes.txt"))


def _idx_size(path: Path) -> int:
    """Return how many values an idx file says that it has; 0 where it cannot be read, which whoever reads it says."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            return idx.size(file.read(idx.LONGEST_HEADER))
    except UNREADABLE:
        return 0


def _read_class_names(path: Path) -> list[str] | None:
    try:
        lines = path.read_text().splitlines() if path.is_file() else None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}: write it again, one name per line") from None
    return [line.strip() for line in lines if line.strip()] if lines else None


def _check_arrays(dataset: str, data: RawData) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Return the arrays of a Dataset by name, and the names of the classes. Raises UserError for unusable data."""
    train = _check_part(dataset, "train", *data.train)
    test = _check_part(dataset, "test", *data.test)
    shapes = [images.shape[1:] for images, _ in (train, test)]
    if shapes[0] != shapes[1]:
        raise UserError(f"dataset {dataset}: test images are {shapes[1]}, training images {shapes[0]}: make them alike")
    names = range(int(train[1].max()) + 1) if data.classes is None else data.classes
    classes = tuple(map(str, names))
    _check_labels(dataset, {"train": train[1], "test": test[1]}, classes)
    arrays = {"train_images": train[0], "train_labels": train[1], "test_images": test[0], "test_labels": test[1]}
    return arrays, classes


def _check_labels(dataset: str, parts: dict[str, np.ndarray], classes: tuple[str, ...]) -> None:
    """Raise UserError for labels of no class, for a class without images in a part, and for one class alone."""
    for part, labels in parts.items():
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


def _check_part(dataset: str, part: str, images: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return images uint8 [N, C, H, W] and labels int64 [N], both writable. Raises UserError for anything else."""
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
    # Writable, because torch warns about memory that is read-only.
    return np.require(images, requirements=["C", "W"]), np.require(labels.reshape(-1), np.int64, ["C", "W"])
