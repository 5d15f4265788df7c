"""Decode a folder of pictures once, into files that every later start maps into memory.

    <cache>/pictures/<key>/          index.json, and of each part its images, uint8 [N, C, S, S], as train.u8, and what
                                     their pixels add up to, int64 [N, C, 2], as train.i64
    <cache>/pictures/<key>.partial/  the same while it is made, and journal.jsonl: what of it is done

The key is a hash of the files' names, sizes and dates, and of the settings: where one differs, another cache is made.
One process makes it, while others wait for its lock. One that was killed is gone on with: a block of pictures is in the
journal when its pixels are on the disk, and a cache gets its name when it is whole.
"""

import contextlib
import functools
import hashlib
import io
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from tqdm import tqdm

from fashion_ddp.console import say
from fashion_ddp.data import image_folder
from fashion_ddp.data.image_folder import Listing
from fashion_ddp.data.published import cache_folder
from fashion_ddp.distributed import machine
from fashion_ddp.errors import UserError, pluralize
from fashion_ddp.files import one_at_a_time, write_whole

T = TypeVar("T")
Array = TypeVar("Array", bound=Any)
Shape = tuple[int, int, int]

FORMAT = 2
INDEX, JOURNAL, PARTIAL = "index.json", "journal.jsonl", ".partial"
BLOCK = 64  # pictures that a thread decodes at a time
KINDS = "u8", "i64"  # of a part's files: images, and sums
LISTED = 20  # pictures that a message names
ROOM = 0.875  # of a stored side is seen, as torchvision's 224 of 256: a random crop has room to move


@dataclass(frozen=True)
class PictureSettings:
    """How the pictures of a folder become arrays."""

    image_size: int = 0  # side of the squares that a model sees; 0: pictures are of one size, and stay as they are
    skip_broken: bool = False  # leave out pictures that cannot be decoded
    cache_dir: Path | None = None  # None: the user's cache folder

    @property
    def root(self) -> Path:
        """Return the folder that caches are made in."""
        return (self.cache_dir or cache_folder()).absolute() / "pictures"


@dataclass(frozen=True)
class Pictures:
    """A decoded set. By part (train, test, and val where the set has one):"""

    stored: dict[str, np.memmap]  # uint8 [N, C, S, S], mapped: not in memory until they are read
    images: dict[str, np.ndarray]  # uint8 [N, C, H, W], a view of these: the centre, which is what a model sees
    sums: dict[str, np.ndarray]  # int64 [N, C, 2], of what is seen: see `pixel_sums`
    labels: dict[str, np.ndarray]  # int64 [N]
    md5: dict[str, str]  # of images and labels
    classes: tuple[str, ...]
    left_out: tuple[str, ...]  # the pictures that could not be decoded, and why


def prepare(folder: Path, settings: PictureSettings, between: Callable[[], object] = lambda: None) -> Path:
    """Make the cache of a folder of pictures, or find it made, and return the cache's folder.

    `between`: called after each block of pictures. What it raises breaks off, and the next call goes on. Raises
    UserError for pictures that cannot be decoded or are of unlike sizes, and for a cache folder that cannot be written
    or has no room.
    """
    listing = image_folder.find(folder)
    key = hashlib.sha256(f"{FORMAT} {settings.image_size} {listing.key}".encode()).hexdigest()[:24]
    made = settings.root / key
    if not (made / INDEX).is_file():
        try:
            settings.root.mkdir(parents=True, exist_ok=True)
            waiting = f"waiting for another process, which decodes the same pictures into {made}"
            with one_at_a_time(settings.root / f".{key}.lock", lambda: say(waiting)):
                if not (made / INDEX).is_file():
                    _make(listing, settings.image_size, made, between)
        except OSError as error:
            raise UserError(
                f"{settings.root} cannot be written ({error.strerror}): name another folder with --cache-dir"
            ) from None
    broken = read_index(made)["left_out"]
    if broken and not settings.skip_broken:
        named = "".join(f"\n  {one}" for one in broken[:LISTED])
        more = f"\n  and {len(broken) - LISTED:,} more" if len(broken) > LISTED else ""
        raise UserError(
            f"dataset {folder}: {pluralize(len(broken), 'picture')} cannot be decoded:{named}{more}\n"
            "repair or remove them, or leave them out with --skip-broken"
        )
    return made


def read_index(made: Path) -> dict[str, Any]:
    """Read what a cache says of itself. Raises UserError where it does not."""
    try:
        return json.loads((made / INDEX).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{made} is damaged ({error}): remove it, and it is made anew") from None


def load(made: Path) -> Pictures:
    """Map a cache that `prepare` made into memory. Raises UserError where it is damaged."""
    index = read_index(made)
    found = Pictures({}, {}, {}, {}, {}, tuple(index["classes"]), tuple(index["left_out"]))
    for name, part in index["parts"].items():
        shape: Shape = index["stored_shape"]
        labels = np.array(part["labels"], np.int64)
        found.stored[name] = _map(made / f"{name}.u8", np.uint8, (len(labels), *shape))
        found.images[name] = centre(found.stored[name], index["image_size"])
        found.sums[name] = _map(made / f"{name}.i64", np.int64, (len(labels), shape[0], 2))
        found.labels[name] = labels
        found.md5[f"{name}_images"], found.md5[f"{name}_labels"] = part["md5"], _md5(labels.tobytes())
    found.md5["classes"] = _md5("\n".join(found.classes).encode(errors="surrogateescape"))
    return found


def _map(path: Path, kind: type[np.integer[Any]], shape: tuple[int, ...]) -> np.memmap:
    """Map a file into memory, as an array. Raises UserError where it has another size."""
    if not path.is_file() or path.stat().st_size != math.prod(shape) * np.dtype(kind).itemsize:
        raise UserError(f"{path} is damaged: remove {path.parent}, and it is made anew")
    if 0 in shape:  # an empty file cannot be mapped
        return np.empty(shape, kind).view(np.memmap)
    # Copy on write: what is written into it stays in this process. torch warns about arrays that are read-only.
    return np.memmap(path, kind, "c", shape=shape)


def stored_side(image_size: int) -> int:
    """Return the side of the squares that are stored of images that a model sees in this size."""
    return round(image_size / ROOM)


def centre(images: Array, side: int) -> Array:
    """Return the squares [..., side, side] at the centre of images (numpy's or torch's); whole images for 0."""
    first = (images.shape[-1] - side) // 2
    return images[..., first : first + side, first : first + side] if side else images


def pixel_sums(images: np.ndarray) -> np.ndarray:
    """Return, of images uint8 [N, C, H, W], the sum of the pixels by channel, and that of their squares: [N, C, 2].

    Of these the mean and the deviation of any part of a set follow exactly, without its pixels.
    """
    pixels = images.reshape(*images.shape[:2], -1)
    squares = np.einsum("ncp,ncp->nc", pixels, pixels, dtype=np.int64)
    return np.stack([pixels.sum(2, dtype=np.int64), squares], axis=2)


def _md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


# --- What there is ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """A cache, whole or not, and how many bytes it takes."""

    folder: Path
    size: int

    @property
    def name(self) -> str:
        return self.folder.name.removesuffix(PARTIAL)

    @property
    def line(self) -> str:
        """Say in a line what the cache holds."""
        text = f"{self.name}  {self.size / 1e9:8,.2f} GB  "
        if self.folder.name.endswith(PARTIAL):
            return f"{text}unfinished"
        index = read_index(self.folder)
        count = sum(len(part["labels"]) for part in index["parts"].values())
        made = time.strftime("%Y-%m-%d", time.localtime((self.folder / INDEX).stat().st_mtime))
        shape = "x".join(map(str, index["stored_shape"]))
        return f"{text}{made}  {pluralize(count, 'picture')}, {shape}, of {index['folder']}"


def found(root: Path) -> list[Found]:
    """Return the caches below a folder, in the order of their names."""
    folders = sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    return [Found(path, sum(file.stat().st_size for file in path.iterdir())) for path in folders]


def remove(root: Path, names: Sequence[str]) -> list[Found]:
    """Remove caches by their names, or `all`, and return them.

    Raises UserError for a name that is none of them, and for a cache that another process is making.
    """
    there = found(root)
    if unknown := [name for name in names if name not in {"all", *(one.name for one in there)}]:
        raise UserError(
            f"remove_caches: {root} has no {unknown[0]!r}; `python -m fashion_ddp.data --caches` lists them"
        )
    removed = []
    for one in there:
        if "all" in names or one.name in names:
            with one_at_a_time(root / f".{one.name}.lock", functools.partial(_refuse_busy, one.folder)):
                shutil.rmtree(one.folder)
            removed.append(one)
    return removed


def _refuse_busy(folder: Path) -> None:
    raise UserError(f"{folder} is being made by another process: stop that one first")


# --- Making one -------------------------------------------------------------------------------------------------


class Block(NamedTuple):
    """Some pictures of a part, which a thread decodes."""

    part: str
    first: int  # the row of the first picture
    paths: list[Path]

    @property
    def name(self) -> str:
        return f"{self.part} {self.first}"


class Looked(NamedTuple):
    """What the heads of a block's pictures say: whether all are grey, and of each size (width, height) a picture."""

    grey: bool
    sizes: dict[tuple[int, int], Path]


class PartFiles(NamedTuple):
    """What of a part is written. Unbuffered, and each row at its own place: threads write side by side."""

    images: io.FileIO
    sums: io.FileIO


def _row_sizes(shape: Shape) -> tuple[int, int]:
    """Return the bytes that a picture of this shape takes in each file of its part."""
    return math.prod(shape), shape[0] * 2 * np.dtype(np.int64).itemsize


class Journal:
    """What was found out and done, by name, in a file that a process after this one reads."""

    def __init__(self, path: Path):
        self.path = path
        self.found: dict[str, Any] = {}
        for line in path.read_text().splitlines() if path.is_file() else []:
            with contextlib.suppress(ValueError):  # a line that was cut off by a kill
                self.found |= json.loads(line)

    def write(self, name: str, finding: Any) -> None:
        """Write a finding down; when this returns it is on the disk."""
        self.found[name] = finding
        with open(self.path, "a") as file:
            file.write("\n" + json.dumps({name: finding}))  # the line before may have been cut off
            file.flush()
            os.fsync(file.fileno())


def _make(listing: Listing, image_size: int, made: Path, between: Callable[[], object]) -> None:
    """Decode a listing's pictures into a cache, from where another process left off."""
    partial = made.with_name(f"{made.name}{PARTIAL}")
    partial.mkdir(exist_ok=True)
    if not (partial / INDEX).is_file():
        index = _decode_all(listing, image_size, partial, between)
        write_whole(partial / INDEX, json.dumps(index) + "\n")
    index = read_index(partial)
    for name, part in index["parts"].items():
        for kind, row in zip(KINDS, _row_sizes(index["stored_shape"]), strict=True):
            os.truncate(partial / f"{name}.{kind}", len(part["labels"]) * row)
    (partial / JOURNAL).unlink(missing_ok=True)
    with contextlib.suppress(FileExistsError):  # where there are no locks, another process was first
        partial.rename(made)


def _decode_all(listing: Listing, image_size: int, partial: Path, between: Callable[[], object]) -> dict[str, Any]:
    """Decode the pictures that the journal does not name yet, and return what the cache says of itself."""
    journal = Journal(partial / JOURNAL)
    blocks = [
        Block(name, first, part.paths[first : first + BLOCK])
        for name, part in listing.parts.items()
        for first in range(0, len(part.paths), BLOCK)
    ]
    if "shape" not in journal.found:
        looked = [one for _, one in _in_threads("looking at", _look, blocks, between)]
        try:
            journal.write("shape", _stored_shape(listing.folder, looked, image_size))
        except UserError:
            partial.rmdir()  # nothing is in it yet
            raise
    shape: Shape = tuple(journal.found["shape"])
    count = sum(len(block.paths) for block in blocks)
    size = count * math.prod(shape)
    _require_room(partial, size)
    say(f"decoding {count:,} pictures into {partial}: {size / 1e9:,.2f} GB")
    with contextlib.ExitStack() as scope:
        files = {}
        for name in listing.parts:
            files[name] = PartFiles(*(scope.enter_context(_open(partial / f"{name}.{kind}")) for kind in KINDS))
        todo = [block for block in blocks if block.name not in journal.found]
        decoding = _in_threads("decoding", lambda one: _decode(one, shape, image_size, files[one.part]), todo, between)
        for block, done in scope.enter_context(contextlib.closing(decoding)):
            journal.write(block.name, done)
        parts, left_out = _close_gaps(listing, blocks, journal, shape, files)
    index = {"parts": parts, "stored_shape": shape, "image_size": image_size, "classes": listing.classes}
    return index | {"left_out": left_out, "folder": str(listing.folder.absolute())}


def _in_threads(
    what: str, work: Callable[[Block], T], blocks: Sequence[Block], between: Callable[[], object]
) -> Generator[tuple[Block, T], None, None]:
    """Yield each block with what the work on it returns. Pillow decodes and scales without Python's lock."""
    total = sum(len(block.paths) for block in blocks)
    with ThreadPoolExecutor(machine.usable_cores()) as pool, tqdm(desc=what, total=total, disable=None) as bar:
        try:
            for block, done in zip(blocks, pool.map(work, blocks), strict=True):
                between()
                yield block, done
                bar.update(len(block.paths))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _look(block: Block) -> Looked:
    """Read the heads of a block's pictures. Those that cannot be read are left for `_decode` to name."""
    from fashion_ddp.data import picture  # not at the top: Pillow takes a while to import

    grey, sizes = True, dict[tuple[int, int], Path]()
    for path in block.paths:
        with contextlib.suppress(*picture.UNREADABLE):
            is_grey, size = picture.look(path)
            grey = grey and is_grey
            sizes.setdefault(size, path)
    return Looked(grey, sizes)


def _stored_shape(folder: Path, looked: list[Looked], image_size: int) -> Shape:
    """Return the shape (C, H, W) of stored images: one channel if all pictures are grey, else three.

    Raises UserError for pictures of unlike sizes, where no size was asked for.
    """
    channels = 1 if all(one.grey for one in looked) else 3
    if image_size:
        return channels, stored_side(image_size), stored_side(image_size)
    sizes: dict[tuple[int, int], Path] = {}
    for block in looked:
        sizes = block.sizes | sizes
    if len(sizes) > 1:
        (one, first), (other, second) = [*sizes.items()][:2]
        raise UserError(
            f"dataset {folder}: pictures must be of one size; {first} is {one[0]}x{one[1]} and {second} is "
            f"{other[0]}x{other[1]} (width x height): bring all to squares, as with --image-size 64, which scales the "
            "shorter side and keeps the centre"
        )
    [(width, height)] = sizes or [(1, 1)]  # none can be read: `prepare` names them
    return channels, height, width


def _require_room(partial: Path, size: int) -> None:
    """Raise UserError where the disk has no room for the rest of `size` bytes."""
    there = sum(512 * path.stat().st_blocks for path in partial.glob("*.u8"))  # they have holes
    free = shutil.disk_usage(partial).free
    if size - there > free:
        raise UserError(
            f"the pictures, decoded, take {size / 1e9:,.2f} GB, and {free / 1e9:,.2f} GB are free in {partial.parent}: "
            "name a folder on another disk with --cache-dir, or a smaller --image-size; `python -m fashion_ddp.data "
            "--caches` lists what lies there, and --remove-caches removes it"
        )


def _open(path: Path) -> io.FileIO:
    return io.FileIO(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+")


def _decode(block: Block, shape: Shape, image_size: int, files: PartFiles) -> dict[str, Any]:
    """Write a block's images [n, *shape] and their sums to their places. Return the images' md5, and what is broken, by
    row."""
    from PIL import UnidentifiedImageError

    from fashion_ddp.data import picture

    images, broken = np.zeros((len(block.paths), *shape), np.uint8), {}
    for row, path in enumerate(block.paths):
        try:
            images[row] = picture.load(path, shape)
        except picture.UNREADABLE as error:
            unknown = isinstance(error, UnidentifiedImageError)  # whose text repeats the path
            why = "no picture of a kind that Pillow reads" if unknown else getattr(error, "strerror", None) or error
            broken[row] = f"{path}: {why}"
    content = images.tobytes()
    sums = pixel_sums(centre(images, image_size)).tobytes()
    for file, written, row in zip(files, (content, sums), _row_sizes(shape), strict=True):
        os.pwrite(file.fileno(), written, block.first * row)
        os.fdatasync(file.fileno())
    return {"md5": _md5(content), "broken": broken}


def _close_gaps(
    listing: Listing, blocks: list[Block], journal: Journal, shape: Shape, files: dict[str, PartFiles]
) -> tuple[dict[str, Any], list[str]]:
    """Move the last images, and their sums, to the places of those that are missing. Return of each part its labels
    and md5, and the pictures that are left out, and why. To do it twice does no harm."""
    parts, left_out = {}, list[str]()
    for name, part in listing.parts.items():
        mine = [(block, journal.found[block.name]) for block in blocks if block.part == name]
        broken = {block.first + int(n): why for block, done in mine for n, why in done["broken"].items()}
        labels, count = part.labels.copy(), len(part.labels) - len(broken)
        gaps = [n for n in sorted(broken) if n < count]
        last = [n for n in range(count, len(labels)) if n not in broken]
        for gap, moved in zip(gaps, last, strict=True):
            for file, row in zip(files[name], _row_sizes(shape), strict=True):
                os.pwrite(file.fileno(), os.pread(file.fileno(), row, moved * row), gap * row)
            labels[gap] = labels[moved]
        for file in files[name]:
            os.fsync(file.fileno())
        md5 = _md5(json.dumps([[done["md5"] for _, done in mine], sorted(broken)]).encode())
        parts[name] = {"labels": labels[:count].tolist(), "md5": md5}
        left_out += [broken[n] for n in sorted(broken)]
    return parts, left_out
