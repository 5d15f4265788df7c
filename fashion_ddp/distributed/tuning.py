"""Tune a process's memory allocator, garbage collector and scheduling, so that steps do not wait."""

import atexit
import contextlib
import ctypes
import gc
import os
from collections.abc import Iterator

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # parameters of glibc's mallopt; older versions limit the latter to 32 MB


def keep_freed_memory() -> None:
    """Keep the memory that this process frees, for its next use.

    By default glibc returns arrays of a layer's size to the system at once, and each step pays for getting them again,
    page by page: a fifth of a small cnn's step.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library: leave it as it is
        libc = ctypes.CDLL(None)
        for parameter, size in ((M_MMAP_THRESHOLD, 2**25), (M_TRIM_THRESHOLD, 2**31 - 1)):
            libc.mallopt(parameter, size)


def schedule_as_batch() -> None:
    """Schedule this process's threads, and those that they start, as batch: a thread that wakes interrupts no other.

    A gloo all-reduce wakes about ten threads. As Linux 6.18 schedules them by default, every tenth to third all-reduce
    waits for a clock tick of 4 ms. A policy that the user chose stays.
    """
    with contextlib.suppress(OSError, AttributeError):  # another system, or a sandbox: leave it as it is
        if os.sched_getscheduler(0) == os.SCHED_OTHER:
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def end_threads() -> None:
    """End the threads that share this one's CPU work; the next operation starts others.

    A process forked from here has none of them, and would wait for them for ever.
    """
    with contextlib.suppress(OSError, AttributeError):  # torch is not loaded, or shares work in another way
        ctypes.CDLL(None).omp_pause_resource_all(1)  # OpenMP's own function for this; 1 keeps its settings


os.register_at_fork(before=end_threads)  # as notebook_launcher forks its ranks


@contextlib.contextmanager
def gc_paused() -> Iterator[None]:
    """Pause garbage collection while modules are imported, and keep their objects out of it afterwards.

    Going through all objects again and again is a sixth of the time that torch and Accelerate take to import.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        atexit.register(gc.unfreeze)  # Triton complains of its objects that are there to the end
        if was_enabled:
            gc.enable()


@contextlib.contextmanager
def gc_frozen() -> Iterator[None]:
    """Collect garbage only among objects made from now on, until the block ends.

    Going through all that is loaded takes 0.14 s, as long as an epoch of a linear model.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
