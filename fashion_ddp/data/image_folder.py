"""Find the pictures of a dataset in folders: train/<class>/, and test/<class>/ or val/<class>/, or both."""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fashion_ddp.errors import UserError

ENDINGS = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}


@dataclass(frozen=True)
class Part:
    """The pictures of one part, in an order that mixes the classes and is the same on every machine."""

    paths: list[Path]
    labels: np.ndarray  # int64 [N]
    stamps: list[tuple[str, int, int]]  # of each its name below the part, its size in bytes and its date in ns


@dataclass(frozen=True)
class Listing:
    """The pictures of a dataset: parts train and test, and val where it has both of val/ and test/."""

    folder: Path
    classes: list[str]
    parts: dict[str, Part]

    @property
    def key(self) -> str:
        """Return a hash of names, sizes and dates: another one when a picture was added, changed or removed."""
        digest = hashlib.sha256()
        for name, part in self.parts.items():
            digest.update(repr((name, part.stamps)).encode(errors="surrogateescape"))
        return digest.hexdigest()


def find(folder: Path) -> Listing:
    """Find the pictures of a dataset, without opening them.

    Raises UserError for folders that are missing or cannot be read, and for a class that is not in train/.
    """
    others = [name for name in ("val", "test") if (folder / name).is_dir()]
    if not others:
        raise UserError(
            f"dataset {folder}: has train/, and neither test/ nor val/: put pictures to test by into test/<class>/"
        )
    # A set with val/ alone, as ImageNet is shipped, is tested on that.
    roles = {"train": "train", **({"val": "val", "test": "test"} if len(others) == 2 else {"test": others[0]})}
    classes = sorted(_class_names(folder / "train"))
    for name in others:
        if unknown := sorted(set(_class_names(folder / name)) - set(classes)):
            raise UserError(
                f"dataset {folder}: class {unknown[0]!r} has a folder in {name}/ and none in train/: add it"
            )
    parts = {role: _find_pictures(folder / name, classes) for role, name in roles.items()}
    if not any(part.paths for part in parts.values()):
        raise UserError(f"dataset {folder}: no pictures in train/<class>/ and {others[0]}/<class>/: put some there")
    return Listing(folder, classes, parts)


def _class_names(folder: Path) -> list[str]:
    try:
        return [path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror}): it must hold a folder for each class") from None


def _find_pictures(folder: Path, classes: list[str]) -> Part:
    """Find the pictures below a folder, in the order of the md5 of their names.

    This order is the same on every machine and mixes the classes, which a recipe without shuffling needs.
    """
    found = []
    for label, name in enumerate(classes):
        for entry in _files_below(folder / name):
            key = Path(entry.path).relative_to(folder).as_posix()
            digest = hashlib.md5(key.encode(errors="surrogateescape"), usedforsecurity=False).digest()
            stat = entry.stat()
            found.append((digest, key, entry.path, label, stat.st_size, stat.st_mtime_ns))
    found.sort()
    return Part(
        [Path(path) for _, _, path, *_ in found],
        np.array([label for *_, label, _, _ in found], np.int64),
        [(key, size, date) for _, key, _, _, size, date in found],
    )


def _files_below(folder: Path) -> Iterator[os.DirEntry[str]]:
    """Yield the pictures in a folder and in those below it; none where there is no folder."""
    try:
        entries = [*os.scandir(folder)]
    except FileNotFoundError:
        return
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            yield from _files_below(Path(entry.path))
        elif os.path.splitext(entry.name)[1].lower() in ENDINGS and not entry.name.startswith(".") and entry.is_file():
            yield entry
