"""Where a set's images lie, and how a step gets them: all on the device, or read ahead from a file or host memory.

Both ways give the same pixels, and are asked alike:

    images.order(table)         what will be wanted: int64 [steps, places, rows] on the host, -1 for nothing; a second
                                table may follow, whose places come after these
    images.bring(k)             let step k be next
    images.take(place, index)   its images at a place, uint8 [rows, C, H, W], which `index` [rows] names on the device
"""

import contextlib
import os
from collections import deque
from collections.abc import Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from fashion_ddp.config import Config
from fashion_ddp.data.cache import centre, pixel_sums
from fashion_ddp.distributed import machine
from fashion_ddp.distributed.world import World
from fashion_ddp.errors import TrainingFailed

Place = Literal["device", "trial", "host"]  # trial: a first step tells

AHEAD = 3  # steps whose images are read while another is taken
COPIED = 2**26  # bytes that go to a card at a time: the host never holds the set twice
SURELY = 0.25  # of a card's free memory: what takes no more needs no trial step
MARGIN = 0.05  # of a card's memory, kept free beside the set and what a step takes


@dataclass(frozen=True, eq=False)
class Part:
    """A part of a dataset: images to train on, to choose by, or to test on."""

    images: np.ndarray  # uint8 [M, C, H, W]
    labels: np.ndarray  # int64 [N]
    rows: np.ndarray | None = None  # int64 [N]: which of the images; None for all of them
    stored: np.memmap | None = None  # uint8 [M, C, S, S]: what the images are the centre of, where it lies in a file
    known_sums: np.ndarray | None = None  # int64 [M, C, 2], see `pixel_sums`

    @property
    def nbytes(self) -> int:
        """Return how many bytes the images take."""
        return len(self.labels) * self.images[0].nbytes

    def subset(self, rows: np.ndarray) -> "Part":
        """Return the part that has only these rows. Of a file nothing is copied."""
        if self.stored is None:
            return Part(self.images[rows], self.labels[rows])
        return Part(self.images, self.labels[rows], rows, self.stored, self.known_sums)

    def sums(self) -> np.ndarray:
        """Return the sums of each image's pixels, and of their squares: [N, C, 2] int64."""
        if self.known_sums is not None:
            return self.known_sums if self.rows is None else self.known_sums[self.rows]
        return np.concatenate([pixel_sums(some) for some in _some(self.images, self.nbytes)])


def _some(images: np.ndarray, nbytes: int) -> list[np.ndarray]:
    """Cut an array into parts whose images take about COPIED bytes."""
    return np.array_split(images, nbytes // COPIED + 1)


class Images(Protocol):
    """The images of a part, as steps ask for them; see the module."""

    lie_on: str  # "device" or "host", as the setting data_on has it

    def order(self, table: Tensor, more: Tensor | None = None) -> None: ...
    def bring(self, k: int) -> None: ...
    def take(self, place: int, index: Tensor) -> Tensor: ...
    def close(self) -> None: ...


class Holder(Protocol):
    """What steps or evaluations take images of."""

    part: Part
    images: Images


def lay(part: Part, device: torch.device, place: Place) -> Images:
    """Return the images of a part, where they are to lie; for a trial on the host."""
    return Resident(part, device) if place == "device" else Stream(part, device)


class Resident:
    """All images of a part in a device's memory; on a CPU they may be a file that is mapped there."""

    lie_on = "device"

    def __init__(self, part: Part, device: torch.device):
        self.rows: Tensor | None = None  # of a mapped file, which images are in the part
        if device.type == "cpu":
            self.images = torch.from_numpy(part.images)
            self.rows = None if part.rows is None else torch.from_numpy(part.rows)
            return
        rows = np.arange(len(part.labels)) if part.rows is None else part.rows
        self.images = torch.empty((len(rows), *part.images.shape[1:]), dtype=torch.uint8, device=device)
        done = 0
        for some in _some(rows, part.nbytes):
            self.images[done : done + len(some)] = torch.from_numpy(part.images[some])
            done += len(some)

    def order(self, table: Tensor, more: Tensor | None = None) -> None:
        """Do nothing: all is here."""

    def bring(self, k: int) -> None:
        """Do nothing: all is here."""

    def take(self, place: int, index: Tensor) -> Tensor:
        """Return the images that `index` names."""
        return self.images.index_select(0, index if self.rows is None else self.rows.index_select(0, index))

    def close(self) -> None:
        """Do nothing: no thread is at work."""


class Buffer:
    """Room for the images of a step [places, rows, C, S, S]: on the host, and for a card there, too."""

    def __init__(self, shape: Sequence[int], device: torch.device):
        self.host = torch.empty(*shape, dtype=torch.uint8, pin_memory=device.type == "cuda")
        if device.type == "cuda":
            self.card = torch.empty(*shape, dtype=torch.uint8, device=device)
            self.copied, self.used = torch.cuda.Event(), torch.cuda.Event()  # to the card; by the step


class Stream:
    """The images of a part, of which memory holds those of a few steps: a thread reads ahead.

    A card gets them by a stream of its own while a step is at work, and that finds them always at the same place in
    memory, which a CUDA graph knows. A file is read, not mapped: mapped, its pages would count as this process's
    memory, and where a disk fails a process that reads them is killed without a word.
    """

    lie_on = "host"

    def __init__(self, part: Part, device: torch.device):
        self.rows, self.side = part.rows, part.images.shape[-1]
        self.source: np.ndarray = np.ascontiguousarray(part.images if part.stored is None else part.stored)
        self.path = None if part.stored is None else part.stored.filename
        self.file = -1 if self.path is None else os.open(self.path, os.O_RDONLY)
        self.device, self.on_card = device, device.type == "cuda"
        self.copying = torch.cuda.Stream(device) if self.on_card else None
        self.thread = ThreadPoolExecutor(1, "images")
        self.table, self.next = np.empty((0, 0, 0), np.int64), 0  # the rows of each step; which is read next
        self.free: deque[Buffer] = deque()
        self.coming: deque[tuple[int, Buffer, Future[None]]] = deque()
        self.current: Buffer | None = None
        self.place: Tensor | None = None  # what `take` looks at

    def order(self, table: Tensor, more: Tensor | None = None) -> None:
        """Read these images from now on, step after step."""
        wanted = table.numpy() if more is None else np.concatenate([table.numpy(), more.numpy()], axis=1)
        self.table = wanted if self.rows is None else np.where(wanted < 0, -1, self.rows[wanted])
        if self.place is None:
            shape = (*wanted.shape[1:], *self.source.shape[1:])
            self.free.extend(Buffer(shape, self.device) for _ in range(AHEAD + 1))
            self.place = torch.empty(*shape, dtype=torch.uint8, device=self.device)
        self._read_from(0)

    def bring(self, k: int) -> None:
        """Let the images of step k be those that `take` returns. Raises TrainingFailed where they cannot be read."""
        if not self.coming or self.coming[0][0] != k:
            self._read_from(k)
        _, buffer, reading = self.coming.popleft()
        try:
            reading.result()
        except OSError as error:
            raise TrainingFailed(
                f"{self.path} cannot be read ({error.strerror or error}): mend that, and the same command continues"
            ) from None
        if self.current is not None:
            self.free.append(self.current)
        self.current = buffer
        if self.on_card and self.place is not None:
            torch.cuda.current_stream().wait_event(buffer.copied)
            self.place.copy_(buffer.card)
            buffer.used.record()
        else:
            self.place = buffer.host
        self._read_ahead()

    def take(self, place: int, index: Tensor) -> Tensor:
        """Return the images at a place, as many as `index` names."""
        assert self.place is not None, "images are ordered and brought before they are taken"
        return centre(self.place[place, : len(index)], self.side)

    def close(self) -> None:
        """Let the thread end, and the file go."""
        self._take_back()
        self.thread.shutdown()
        if self.file >= 0:
            os.close(self.file)

    def _read_from(self, k: int) -> None:
        self._take_back()
        self.next = k
        self._read_ahead()

    def _read_ahead(self) -> None:
        """Have what is free filled with the next steps' images."""
        while self.free and self.next < len(self.table):
            buffer = self.free.popleft()
            self.coming.append((self.next, buffer, self.thread.submit(self._read, self.table[self.next], buffer)))
            self.next += 1

    def _take_back(self) -> None:
        """Have nothing more read of what was ordered."""
        for _, buffer, reading in self.coming:
            if not reading.cancel():
                reading.exception()  # waits for its end, whatever that is
            self.free.append(buffer)
        self.coming.clear()

    def _read(self, wanted: np.ndarray, buffer: Buffer) -> None:
        """Fill a buffer with the images of a step, int64 [places, rows]. Runs in the thread."""
        if self.on_card:
            buffer.copied.synchronize()
        rows, to = wanted.reshape(-1), buffer.host.numpy().reshape(-1, *self.source.shape[1:])
        if self.path is None:
            np.take(self.source, rows, 0, to, "clip")  # -1 becomes 0: which image does not matter
        else:
            self._read_file({place: row for place, row in enumerate(rows.tolist()) if row >= 0}, to)
        if self.copying is not None:
            with torch.cuda.stream(self.copying):
                self.copying.wait_event(buffer.used)
                buffer.card.copy_(buffer.host, non_blocking=True)
                buffer.copied.record()

    def _read_file(self, rows: dict[int, int], to: np.ndarray) -> None:
        """Read rows of the file, each to its place."""
        size = to[0].nbytes
        for row in rows.values():  # a disk, or a server, hears of all of them before it is waited for
            with contextlib.suppress(OSError, AttributeError):  # a hint, which not every system takes
                os.posix_fadvise(self.file, row * size, size, os.POSIX_FADV_WILLNEED)
        for place, row in rows.items():
            image, read = memoryview(to[place].reshape(-1)), 0
            while read < size:
                some = os.preadv(self.file, [image[read:]], row * size + read)
                if not some:
                    raise OSError(f"it ends before image {row:,}")
                read += some


def choose_place(cfg: Config, world: World, parts: Collection[Part]) -> Place:
    """Return where the images of a run are to lie, as all ranks agree.

    Raises UserError where a card was asked for that has no room. A collective.
    """
    if world.device.type == "cuda":
        needed = sum(part.nbytes for part in parts)
        free: int | None = world.card_memory()[0]
        where, surely = f"{world.device_name} ({world.device})", SURELY
    else:  # what lies in no file is in this memory already; and what does is dropped from it where that is needed
        needed, free = sum(part.nbytes for part in parts if part.stored is not None), machine.free_memory()
        where, surely = "this machine", 1.0
    if cfg.data_on == "device" and world.device.type == "cuda":
        what, way_on = f"dataset {cfg.dataset}, decoded,", "leave --data-on device out, and it is read ahead"
        world.raise_together(lambda: machine.require_memory(what, needed, free, where, way_on))
    if cfg.data_on != "auto":
        return cfg.data_on
    places: list[Place] = ["device", "trial", "host"]
    here = 0 if free is None or needed <= surely * free else 1 if needed <= free else 2
    return places[max(world.all_gather_object(here))]


def settle(world: World, place: Place, trained: Sequence[Tensor], holders: Sequence[Holder], scope: ExitStack) -> None:
    """After a first step of what is `trained`: if it was a trial, move all images onto the card, where they fit there
    beside what it took. At the end of the scope, let threads go. A collective.
    """
    for holder in holders:
        scope.callback(lambda one: one.images.close(), holder)
    if place != "trial":
        return
    free, total = world.card_memory()
    # A CUDA graph keeps what a step takes a second time, and an optimizer up to two numbers for each weight.
    kept = 2 * sum(parameter.nbytes for parameter in trained)
    beside = torch.cuda.max_memory_reserved(world.device) + kept + int(MARGIN * total)
    needed = sum(holder.part.nbytes for holder in holders)
    if all(world.all_gather_object(needed + beside <= free)):
        for holder in holders:
            holder.images.close()
            holder.images = Resident(holder.part, world.device)
