"""A dataset, verified and decoded.

Where a published set is looked for: published.py. Where it comes from: download.py. What else is data: custom.py.
"""

import gzip
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fashion_ddp.data import idx, custom, synthetic
from fashion_ddp.config import names
from fashion_ddp.data.download import fetch
from fashion_ddp.errors import UserError
from fashion_ddp.data.published import PUBLISHED, File, Form, absent, locate, published_as

__all__ = ["PUBLISHED", "Dataset", "fetch", "load", "locate"]


@dataclass(frozen=True, eq=False)
class Dataset:
    """A dataset, decoded and verified."""

    name: str
    classes: tuple[str, ...]
    train_images: np.ndarray  # uint8 [N, C, H, W]
    train_labels: np.ndarray  # int64 [N]
    test_images: np.ndarray  # uint8 [n, C, H, W]
    test_labels: np.ndarray  # int64 [n]
    md5: dict[str, str]  # of each file as published, however it is stored; of other sets: of each array
    source: str  # where it was read from, or "built in"

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)"""
        channels, height, width = self.train_images.shape[1:]
        return channels, height, width

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in (self.train_images, self.train_labels, self.test_images, self.test_labels))

    @property
    def synthetic(self) -> bool:
        return self.name == "synthetic"


def load(name: str, data_dir: Path | None = None) -> Dataset:
    """The dataset, verified and decoded. Nothing is downloaded or written.

    Raises UserError for files that are not there, cannot be read, do not hold what was published, or, if they are the
    user's own, what can be trained on.
    """
    names.check_dataset(name)
    if name == "synthetic":
        arrays = synthetic.arrays()
        md5 = {key: Form.of(array.tobytes()).md5 for key, array in arrays.items()}
        return Dataset(name, synthetic.CLASSES, **arrays, md5=md5, source="built in")
    if name not in PUBLISHED:
        own, named_classes = custom.load(name)
        return Dataset(names.dataset_name(name), named_classes, **own, md5=custom.md5(own, named_classes), source=name)
    published, folder = PUBLISHED[name], locate(name, data_dir)
    if folder is None:
        raise UserError(absent(name, data_dir))
    paths = [file.path(folder) for file in published.files]
    train_images, train_labels, test_images, test_labels = (
        _decode(path, _read(name, path, file), axes)
        for path, file, axes in zip(paths, published.files, (3, 1, 3, 1), strict=True)
    )
    classes = len(published.classes)
    for images, labels, path in ((train_images, train_labels, paths[1]), (test_images, test_labels, paths[3])):
        _require(len(labels) == len(images), path, f"{len(images):,} labels, one per image", f"{len(labels):,}")
        highest = labels.max(initial=0)
        _require(highest < classes, path, f"labels below {classes}, one per class", f"label {highest}")
    shapes = [images.shape[1:] for images in (train_images, test_images)]
    _require(shapes[0] == shapes[1], paths[2], f"images of {shapes[0]} like the training set's", str(shapes[1]))
    return Dataset(
        name=name,
        classes=published.classes,
        train_images=train_images[:, None],
        train_labels=train_labels.astype(np.int64),
        test_images=test_images[:, None],
        test_labels=test_labels.astype(np.int64),
        md5={f"{file.name}.gz": file.gz.md5 for file in published.files},
        source=str(folder),
    )


def _require(holds: bool, path: Path, expected: object, found: object) -> None:
    if not holds:
        raise _damaged(path, f"expected {expected}, found {found}")


def _damaged(path: Path, what: str) -> UserError:
    return UserError(
        f"{path} is damaged or another file: {what}: put a good copy in its place, "
        "or delete it and run `python -m fashion_ddp.data` where there is a network"
    )


def _read(name: str, path: Path, file: File) -> bytes:
    """A file's content, verified and unpacked."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): mend that, or name another folder") from None
    packed = path.suffix == ".gz"
    expected, found = file.gz if packed else file.idx, Form.of(content)
    if found != expected and (other := published_as(found)) not in (None, name):
        raise UserError(f"{path} is of {other}, not {name}: name the folder of {name} with --data-dir")
    _require(found == expected, path, expected, found)
    return gzip.decompress(content) if packed else content


def _decode(path: Path, content: bytes, axes: int) -> np.ndarray:
    try:
        return idx.decode(content, axes)
    except ValueError as error:
        raise _damaged(path, str(error)) from None
