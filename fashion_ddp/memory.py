"""Memory: what can still be had, a refusal of data that does not fit, and what a process keeps."""

import contextlib
import ctypes
import gc
from collections.abc import Iterator
from pathlib import Path

from fashion_ddp.errors import UserError

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt; older ones refuse the latter above 32 MB


def free() -> int | None:
    """Bytes of this machine's memory that can still be had: what is available, and a container's limit (cgroup v2).
    None where the system does not tell."""
    found = []
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found.append(1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")))
    with contextlib.suppress(OSError, ValueError, KeyError):
        group = Path("/sys/fs/cgroup")
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        found.append(limit - used + int(stat["file"]))  # the cache of files makes room
    return min(found, default=None)


def require(what: str, needed: int, free: int | None, on: str = "this machine") -> None:
    """Raises UserError, with both sizes, where something does not fit into the memory that is free."""
    if free is not None and needed > free:
        raise UserError(
            f"{what} takes {needed / 1e9:,.2f} GB, and {free / 1e9:,.2f} GB of memory are free on {on}: take fewer or "
            "smaller images, fewer ranks on the machine, or another machine"
        )


def keep_freed() -> None:
    """Let this process keep memory that it frees for its next use. By default glibc gives arrays of a layer's size back
    to the system at once, and each step pays for getting them again, page by page: a fifth of a small cnn's step."""
    with contextlib.suppress(OSError, AttributeError):  # another C library does as it does
        libc = ctypes.CDLL(None)
        for parameter, size in ((M_MMAP_THRESHOLD, 2**25), (M_TRIM_THRESHOLD, 2**31 - 1)):
            libc.mallopt(parameter, size)


@contextlib.contextmanager
def loading() -> Iterator[None]:
    """While modules are loaded, Python looks for no garbage, and among them not before `settled` ends: going through
    all that is there, again and again, is a sixth of the time that torch and Accelerate take to load."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was:
            gc.enable()


@contextlib.contextmanager
def settled() -> Iterator[None]:
    """Python looks for garbage in what is made from here on only: to go through all that is loaded takes it 0.14 s, as
    long as an epoch of a linear model."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
