"""Describe the published datasets, and search for their files.

If the user chooses a folder, with --data-dir or else with $FASHION_DDP_DATA_DIR, only that folder is searched. It is
read and never written, and a missing file is an error. Otherwise ./data and then the user's cache folder
($XDG_CACHE_HOME/fashion_ddp, by default ~/.cache/fashion_ddp) are searched, and downloads go to the cache folder.
In each folder, the four files are either where torchvision puts them (FashionMNIST/raw/) or directly in the folder,
each as published (.gz) or unpacked.
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Fingerprint:
    """Identify a file's content by its size and md5."""

    size: int  # bytes
    md5: str

    @classmethod
    def from_bytes(cls, content: bytes) -> "Fingerprint":
        return cls(len(content), hashlib.md5(content, usedforsecurity=False).hexdigest())

    def __str__(self) -> str:
        return f"{self.size:,} bytes with md5 {self.md5}"


@dataclass(frozen=True)
class IdxFile:
    """An idx file: its name when unpacked, and its fingerprints as published (name.gz) and unpacked."""

    name: str
    gz: Fingerprint
    idx: Fingerprint | None  # None: not known, so that only the packed file is accepted

    def path_in(self, folder: Path) -> Path:
        """Return the file's path in a folder: the packed file if it exists, else the unpacked one, which may not."""
        packed = folder / f"{self.name}.gz"
        return packed if self.idx is None or os.path.isfile(packed) else folder / self.name

    def exists_in(self, folder: Path) -> bool:
        return os.path.isfile(self.path_in(folder))


NAMES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
UNPACKED_SIZES = (47_040_016, 60_008, 7_840_016, 10_008)  # bytes of each, the same in every relative of MNIST


@dataclass(frozen=True)
class PublishedDataset:
    """A relative of MNIST: where its files are, and what they contain."""

    folder: str  # below a data folder, in torchvision's layout
    urls: tuple[str, ...]  # web folders that have the .gz files, tried in this order
    classes: tuple[str, ...]
    files: tuple[IdxFile, ...]  # training images and labels, test images and labels


def _files(*known: tuple[int, str, str | None]) -> tuple[IdxFile, ...]:
    """Return the four files, given for each the packed size, the packed md5, and the unpacked md5 or None."""
    return tuple(
        IdxFile(name, Fingerprint(size, md5), Fingerprint(unpacked_size, unpacked_md5) if unpacked_md5 else None)
        for name, unpacked_size, (size, md5, unpacked_md5) in zip(NAMES, UNPACKED_SIZES, known, strict=True)
    )


PUBLISHED = {
    "fashion_mnist": PublishedDataset(
        folder="FashionMNIST/raw",
        urls=(
            "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
            "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
        ),
        classes=(
            *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
            *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
        ),
        files=_files(
            (26_421_880, "8d4fb7e6c68d591d4c3dfef9ec88bf0d", "f4a8712d7a061bf5bd6d2ca38dc4d50a"),
            (29_515, "25c81989df183df01b3e8a0aad5dffbe", "9018921c3c673c538a1fc5bad174d6f9"),
            (4_422_102, "bef4ecab320f06d8554ea6380940ec79", "8181f5470baa50b63fa0f6fddb340f0a"),
            (5_148, "bb300cfdad3c16e7a12a480ee83cd310", "15d484375f8d13e6eb1aabb0c3f46965"),
        ),
    ),
    "mnist": PublishedDataset(
        folder="MNIST/raw",
        urls=(
            "https://ossci-datasets.s3.amazonaws.com/mnist/",
            "https://storage.googleapis.com/cvdf-datasets/mnist/",
        ),
        classes=tuple("0123456789"),
        files=_files(
            (9_912_422, "f68b3c2dcbeaaa9fbdd348bbdeb94873", "6bbc9ace898e44ae57da46a324031adb"),
            (28_881, "d53e105ee54ea40749a09fcbcd1e9432", "a25bea736e30d166cdddb491f175f624"),
            (1_648_877, "9fb629c4189551a2d022fa330f9573f3", "2646ac647ad5339dbf082846283269ea"),
            (4_542, "ec29112dd5afa0611ce80d1b7f02629c", "27ae3e4e09519cfbb04c329615203637"),
        ),
    ),
    "kmnist": PublishedDataset(
        folder="KMNIST/raw",
        urls=("http://codh.rois.ac.jp/kmnist/dataset/kmnist/",),
        classes=("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"),
        files=_files(
            (18_165_135, "bdb82020997e1d708af4cf47b453dcf7", None),
            (29_497, "e144d726b3acfaa3e44228e80efcd344", None),
            (3_041_136, "5c965bf0a639b31b8f53240b1b52f4d7", None),
            (5_120, "7320c461ea6c1c855c0b718fb2a4b134", None),
        ),
    ),
}


def find_dataset_of(fingerprint: Fingerprint) -> str | None:
    """Return the name of the published dataset that a file with this fingerprint belongs to, or None."""
    known = ((name, file) for name, published in PUBLISHED.items() for file in published.files)
    return next((name for name, file in known if fingerprint in (file.gz, file.idx)), None)


def cache_folder() -> Path:
    """Return this package's folder in the user's cache; below it is torchvision's layout."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "fashion_ddp"


def chosen_folder(data_dir: Path | None) -> Path | None:
    """Return the folder that the user chose, by `data_dir` or else by $FASHION_DDP_DATA_DIR; None without either."""
    return data_dir or (Path(folder) if (folder := os.environ.get("FASHION_DDP_DATA_DIR")) else None)


def _searched_folders(data_dir: Path | None) -> list[Path]:
    folder = chosen_folder(data_dir)
    return [folder.absolute()] if folder else [Path("data").absolute(), cache_folder()]


def locate(name: str, data_dir: Path | None) -> Path | None:
    """Return the folder that has all four files of a published dataset, or None. It does not read the files."""
    published = PUBLISHED[name]
    folders = [path for folder in _searched_folders(data_dir) for path in (folder / published.folder, folder)]
    return next((folder for folder in folders if all(file.exists_in(folder) for file in published.files)), None)


def missing_files_message(name: str, data_dir: Path | None) -> str:
    """Return the message for missing files: which they are, where they were searched for, and what to do."""
    published = PUBLISHED[name]
    files = ", ".join(f"{file.name}.gz" for file in published.files)
    where = " or ".join(map(str, _searched_folders(data_dir)))
    forms = " (each may be unpacked)" if all(file.idx for file in published.files) else ""
    advice = "copy them there, or into a folder that you name with --data-dir, or"
    if chosen_folder(data_dir):
        by = "--data-dir" if data_dir else "$FASHION_DDP_DATA_DIR"
        where, advice = f"{where} (from {by})", f"correct {by}, or leave it out and"
    return (
        f"{name} needs {files}{forms}, which are not all in {where}, nor in {published.folder}/ below: "
        f"{advice} run `python -m fashion_ddp.data --dataset {name}` where there is a network (a login node), "
        f"which puts them into {cache_folder()}"
    )
