"""How a process works with memory, garbage and the scheduler, so that steps wait for nothing."""

import contextlib
import ctypes
import gc
import os
from collections.abc import Iterator

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt; older ones refuse the latter above 32 MB


def keep_freed_memory() -> None:
    """Let this process keep memory that it frees for its next use. By default glibc gives arrays of a layer's size back
    to the system at once, and each step pays for getting them again, page by page: a fifth of a small cnn's step."""
    with contextlib.suppress(OSError, AttributeError):  # another C library does as it does
        libc = ctypes.CDLL(None)
        for parameter, size in ((M_MMAP_THRESHOLD, 2**25), (M_TRIM_THRESHOLD, 2**31 - 1)):
            libc.mallopt(parameter, size)


def schedule_as_batch() -> None:
    """Ask the system that this process's threads, and those they start, interrupt nobody when they wake. An all-reduce
    of gloo wakes some ten; as Linux 6.18 schedules them by default, every tenth to third one waits for a tick of the
    clock, 4 ms. A policy that the user chose stays."""
    with contextlib.suppress(OSError, AttributeError):  # another system, or a sandbox, does as it does
        if os.sched_getscheduler(0) == os.SCHED_OTHER:
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


@contextlib.contextmanager
def gc_paused() -> Iterator[None]:
    """While modules are loaded, Python looks for no garbage, and among them not before `gc_frozen` ends: going through
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
def gc_frozen() -> Iterator[None]:
    """Python looks for garbage in what is made from here on only: to go through all that is loaded takes it 0.14 s, as
    long as an epoch of a linear model."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
