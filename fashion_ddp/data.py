"""Find the data, else download it; verify and decode it.

    python -m fashion_ddp.data [--data-dir DIR]

Where it is looked for: published.py. Where it comes from: download.py.
"""

import gzip
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tyro

from fashion_ddp import synthetic
from fashion_ddp.console import fail
from fashion_ddp.download import fetch
from fashion_ddp.errors import UserError
from fashion_ddp.private import keep_others_out
from fashion_ddp.published import PUBLISHED, File, Form, absent, locate

__all__ = ["Dataset", "fetch", "load", "locate", "main"]


@dataclass(frozen=True, eq=False)
class Dataset:
    """A dataset, decoded and verified."""

    name: str
    classes: tuple[str, ...]
    train_images: np.ndarray  # uint8 [N, C, H, W]
    train_labels: np.ndarray  # int64 [N]
    test_images: np.ndarray  # uint8 [n, C, H, W]
    test_labels: np.ndarray  # int64 [n]
    md5: dict[str, str]  # of each file as published, however it is stored; synthetic: of each array's bytes
    source: str  # the folder read from, or "built in"

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)"""
        channels, height, width = self.train_images.shape[1:]
        return channels, height, width

    @property
    def synthetic(self) -> bool:
        return self.name == "synthetic"


def load(name: str, data_dir: Path | None = None) -> Dataset:
    """The dataset, verified and decoded. Nothing is downloaded or written.

    Raises UserError for files that are not there, cannot be read, or do not hold what was published.
    """
    if name == "synthetic":
        arrays = synthetic.arrays()
        md5 = {key: Form.of(array.tobytes()).md5 for key, array in arrays.items()}
        return Dataset(name, synthetic.CLASSES, **arrays, md5=md5, source="built in")
    published, folder = PUBLISHED[name], locate(name, data_dir)
    if folder is None:
        raise UserError(absent(name, data_dir))
    paths = [file.path(folder) for file in published.files]
    contents = map(_read, paths, published.files)
    train_images, train_labels, test_images, test_labels = map(_decode, paths, contents, (3, 1, 3, 1))
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
        raise UserError(
            f"{path} is damaged or another file: expected {expected}, found {found}: put a good copy in its place, "
            "or delete it and run `python -m fashion_ddp.data` where there is a network"
        )


def _read(path: Path, file: File) -> bytes:
    """A file's content, verified and unpacked."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): mend that, or name another folder") from None
    packed = path.suffix == ".gz"
    expected, found = file.gz if packed else file.idx, Form.of(content)
    _require(found == expected, path, expected, found)
    return gzip.decompress(content) if packed else content


def _decode(path: Path, content: bytes, axes: int) -> np.ndarray:
    """The array of an idx file of unsigned bytes, uint8 [as its header says].

    An idx file is 0, 0, the type of the values (8: unsigned byte), the number of axes; the length of each axis as a
    big-endian 32-bit number; the values, last axis fastest. Source: http://yann.lecun.com/exdb/mnist
    """
    magic, header = bytes((0, 0, 8, axes)), struct.Struct(f">4x{axes}I")
    is_idx = content.startswith(magic) and len(content) >= header.size
    _require(is_idx, path, f"an idx header starting {magic.hex()}", f"{content[: header.size].hex()}")
    shape = header.unpack_from(content)
    size = header.size + math.prod(shape)
    _require(len(content) == size, path, f"{size:,} bytes for {shape}", f"{len(content):,}")
    # Copied, because torch warns of memory that it must not write.
    return np.frombuffer(content, np.uint8, offset=header.size).reshape(shape).copy()


def main(dataset: Literal["fashion_mnist", "synthetic"] = "fashion_mnist", data_dir: Path | None = None) -> None:
    """Find the data, else download it into the user's cache folder; verify it.

    Args:
        dataset: `synthetic` is built in: there is nothing to find.
        data_dir: The only folder looked into; else $FASHION_DDP_DATA_DIR, or ./data and the user's cache.
    """
    keep_others_out()
    if dataset in PUBLISHED and data_dir is None and locate(dataset, None) is None:
        fetch(dataset)
    data = load(dataset, data_dir)
    shape = "x".join(map(str, data.image_shape))
    print(f"{data.name}: {data.source}")
    print(f"{len(data.train_labels):,} training and {len(data.test_labels):,} test images of {shape}")
    print(f"{len(data.classes)} classes: {', '.join(data.classes)}")
    if not data.synthetic:
        print("md5 verified")


if __name__ == "__main__":
    try:
        tyro.cli(main, prog="python -m fashion_ddp.data")
    except UserError as error:
        fail(error, 2)
