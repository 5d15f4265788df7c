"""The published datasets: what is known of them, and where their files are looked for.

A folder that is named, by --data-dir or else by $FASHION_DDP_DATA_DIR, is the only one looked into: it is read, never
written, and where it lacks a file that is an error. Where none is named, ./data and then the user's cache folder
($XDG_CACHE_HOME/fashion_ddp, by default ~/.cache/fashion_ddp) are looked into, and a download goes to the cache.
In each, the four files lie as torchvision has them (FashionMNIST/raw/) or directly, each published (.gz) or unpacked.
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Form:
    """What tells one content of a file from another."""

    size: int  # bytes
    md5: str

    @classmethod
    def of(cls, content: bytes) -> "Form":
        return cls(len(content), hashlib.md5(content, usedforsecurity=False).hexdigest())

    def __str__(self) -> str:
        return f"{self.size:,} bytes with md5 {self.md5}"


@dataclass(frozen=True)
class File:
    """An idx file: its name unpacked, and its content as published (name.gz) and unpacked."""

    name: str
    gz: Form
    idx: Form

    def path(self, folder: Path) -> Path:
        """Where the folder has the file, rather published than unpacked; it may have neither."""
        published = folder / f"{self.name}.gz"
        return published if os.path.isfile(published) else folder / self.name

    def is_in(self, folder: Path) -> bool:
        return os.path.isfile(self.path(folder))


@dataclass(frozen=True)
class Published:
    """All that tells one relative of MNIST from another."""

    folder: str  # of torchvision's layout
    urls: tuple[str, ...]  # folders that have the .gz files, tried in this order
    classes: tuple[str, ...]
    files: tuple[File, File, File, File]  # training images and labels, test images and labels


PUBLISHED = {
    "fashion_mnist": Published(
        folder="FashionMNIST/raw",
        urls=(
            "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
            "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
        ),
        classes=(
            *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
            *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
        ),
        files=(
            File(
                "train-images-idx3-ubyte",
                gz=Form(26_421_880, "8d4fb7e6c68d591d4c3dfef9ec88bf0d"),
                idx=Form(47_040_016, "f4a8712d7a061bf5bd6d2ca38dc4d50a"),
            ),
            File(
                "train-labels-idx1-ubyte",
                gz=Form(29_515, "25c81989df183df01b3e8a0aad5dffbe"),
                idx=Form(60_008, "9018921c3c673c538a1fc5bad174d6f9"),
            ),
            File(
                "t10k-images-idx3-ubyte",
                gz=Form(4_422_102, "bef4ecab320f06d8554ea6380940ec79"),
                idx=Form(7_840_016, "8181f5470baa50b63fa0f6fddb340f0a"),
            ),
            File(
                "t10k-labels-idx1-ubyte",
                gz=Form(5_148, "bb300cfdad3c16e7a12a480ee83cd310"),
                idx=Form(10_008, "15d484375f8d13e6eb1aabb0c3f46965"),
            ),
        ),
    ),
}


def cache() -> Path:
    """The user's cache folder of this package: torchvision's layout below it."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "fashion_ddp"


def named(data_dir: Path | None) -> Path | None:
    """The folder that the user named, if any."""
    return data_dir or (Path(folder) if (folder := os.environ.get("FASHION_DDP_DATA_DIR")) else None)


def _searched(data_dir: Path | None) -> list[Path]:
    folder = named(data_dir)
    return [folder.absolute()] if folder else [Path("data").absolute(), cache()]


def locate(name: str, data_dir: Path | None) -> Path | None:
    """The folder that holds all four files of a published dataset, or None. Looks at names, not into the files."""
    published = PUBLISHED[name]
    folders = [at for folder in _searched(data_dir) for at in (folder / published.folder, folder)]
    return next((folder for folder in folders if all(file.is_in(folder) for file in published.files)), None)


def absent(name: str, data_dir: Path | None) -> str:
    """The message for files that are not there: which, where they were looked for, and what to do."""
    published = PUBLISHED[name]
    files = ", ".join(f"{file.name}.gz" for file in published.files)
    where = " or ".join(map(str, _searched(data_dir)))
    mend = "copy them there, or into a folder that you name with --data-dir, or"
    if named(data_dir):
        by = "--data-dir" if data_dir else "$FASHION_DDP_DATA_DIR"
        where, mend = f"{where} (from {by})", f"correct {by}, or leave it out and"
    return (
        f"{name} needs {files} (each may be unpacked), which are not all in {where}, nor in {published.folder}/ below: "
        f"{mend} run `python -m fashion_ddp.data --dataset {name}` where there is a network (a login node), "
        f"which puts them into {cache()}"
    )
