"""Load a dataset, verified and decoded.

published.py knows where a published dataset is searched for, download.py where it comes from, custom.py reads a user's
own.
"""

import gzip
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fashion_ddp.config import Config, names
from fashion_ddp.data import custom, idx, synthetic
from fashion_ddp.data.cache import PictureSettings
from fashion_ddp.data.download import fetch
from fashion_ddp.data.published import PUBLISHED, Fingerprint, IdxFile, find_dataset_of, locate, missing_files_message
from fashion_ddp.errors import UserError

__all__ = ["PUBLISHED", "Dataset", "fetch", "load", "load_for", "locate", "picture_settings"]


@dataclass(frozen=True, eq=False)
class Dataset:
    """A dataset, verified and decoded."""

    name: str
    classes: tuple[str, ...]
    train_images: np.ndarray  # uint8 [N, C, H, W]
    train_labels: np.ndarray  # int64 [N]
    test_images: np.ndarray  # uint8 [n, C, H, W]
    test_labels: np.ndarray  # int64 [n]
    md5: dict[str, str]  # by file, as published (.gz) even if it is stored unpacked; of other datasets by array
    source: str  # where it was read from, or "built in"
    val_images: np.ndarray | None = None  # as the others, for a set that has images to choose settings by
    val_labels: np.ndarray | None = None
    left_out: tuple[str, ...] = ()  # pictures that could not be decoded, and why
    # By part, of pictures that lie decoded in a file: as they lie there, and the sums of their pixels.
    stored: Mapping[str, np.memmap] = field(default_factory=dict)  # uint8 [N, C, S, S], with room around what is seen
    sums: Mapping[str, np.ndarray] = field(default_factory=dict)  # int64 [N, C, 2], see `cache.pixel_sums`

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Return (C, H, W)."""
        channels, height, width = self.train_images.shape[1:]
        return channels, height, width

    @property
    def synthetic(self) -> bool:
        return self.name == "synthetic"


def load(
    name: str, data_dir: Path | None = None, pictures: PictureSettings | None = None, made: Path | None = None
) -> Dataset:
    """Load a dataset and verify it, without downloading anything. A folder of pictures is decoded into a cache.

    `name` is a published dataset, `synthetic`, or a user's own (custom.py). Only published ones are searched for in
    `data_dir`. `pictures`: how those of a folder become arrays; `made`: their cache, where it is known to be ready.
    Raises UserError for files that are missing, cannot be read, or differ from the published ones, and for data of the
    user's own that a model cannot be trained on.
    """
    names.check_dataset(name)
    settings = pictures or PictureSettings()
    arrays: dict[str, Any] = {}
    if custom.has_pictures(name):
        found = custom.load_pictures(name, settings, made)
        arrays |= {f"{part}_images": images for part, images in found.images.items()}
        arrays |= {f"{part}_labels": labels for part, labels in found.labels.items()}
        arrays |= {"stored": found.stored, "sums": found.sums, "left_out": found.left_out}
        return Dataset(names.dataset_name(name), found.classes, **arrays, md5=found.md5, source=name)
    if settings.image_size or settings.skip_broken:
        flag = "image_size" if settings.image_size else "skip_broken"
        raise UserError(
            f"{flag} is for a folder of pictures, with train/<class>/; dataset {name} is none: leave it out"
        )
    if name == "synthetic":
        arrays |= synthetic.arrays()
        md5 = {key: Fingerprint.from_bytes(array.tobytes()).md5 for key, array in arrays.items()}
        return Dataset(name, synthetic.CLASSES, **arrays, md5=md5, source="built in")
    if name not in PUBLISHED:
        own, classes = custom.load(name)
        arrays |= own
        md5 = custom.array_hashes(arrays, classes)
        return Dataset(names.dataset_name(name), classes, **arrays, md5=md5, source=name)
    published, folder = PUBLISHED[name], locate(name, data_dir)
    if folder is None:
        raise UserError(missing_files_message(name, data_dir))
    paths = [file.path_in(folder) for file in published.files]
    train_images, train_labels, test_images, test_labels = (
        _decode(path, _read(name, path, file), axes)
        for path, file, axes in zip(paths, published.files, (3, 1, 3, 1), strict=True)
    )
    count = len(published.classes)
    for images, labels, path in ((train_images, train_labels, paths[1]), (test_images, test_labels, paths[3])):
        _require(len(labels) == len(images), path, f"{len(images):,} labels, one per image", f"{len(labels):,}")
        highest = labels.max(initial=0)
        _require(highest < count, path, f"labels below {count}, one per class", f"label {highest}")
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


def load_for(cfg: Config, made: Path | None = None) -> Dataset:
    """Load a run's dataset, see `load`. `made`: the cache of its pictures, where it is known to be ready."""
    return load(cfg.dataset, cfg.data_dir, picture_settings(cfg), made)


def picture_settings(cfg: Config) -> PictureSettings:
    """Return how a run's pictures become arrays."""
    return PictureSettings(cfg.image_size, cfg.skip_broken, cfg.cache_dir)


def _require(holds: bool, path: Path, expected: object, found: object) -> None:
    if not holds:
        raise _damaged_file_error(path, f"expected {expected}, found {found}")


def _damaged_file_error(path: Path, what: str) -> UserError:
    return UserError(
        f"{path} is damaged or another file: {what}: put a good copy in its place, "
        "or delete it and run `python -m fashion_ddp.data` where there is a network"
    )


def _read(name: str, path: Path, file: IdxFile) -> bytes:
    """Return a file's content, verified and unpacked."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): fix that, or name another folder") from None
    packed = path.suffix == ".gz"
    expected, found = file.gz if packed else file.idx, Fingerprint.from_bytes(content)
    if found != expected and (other := find_dataset_of(found)) not in (None, name):
        raise UserError(f"{path} is of {other}, not {name}: name the folder of {name} with --data-dir")
    _require(found == expected, path, expected, found)
    return gzip.decompress(content) if packed else content


def _decode(path: Path, content: bytes, axes: int) -> np.ndarray:
    try:
        return idx.decode(content, axes)
    except ValueError as error:
        raise _damaged_file_error(path, str(error)) from None
