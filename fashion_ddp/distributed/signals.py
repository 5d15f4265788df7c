"""Being told to stop: by a signal, remembered from the program's first line on, or by the death of the launcher.

A handler that saved or talked to other ranks would do so in the middle of a step, on one rank: here it notes the signal
and nothing else. At the next sync point every rank says what it was told, all save at the same step, and end together.
A launcher listens in the same way, and hands on what it hears.
"""

import atexit
import contextlib
import ctypes
import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
REASONS = (*(one.name for one in SIGNALS), "the launcher died")
AT_ONCE = 2.0  # seconds after which a second SIGINT means: now (a terminal and a launcher may both send the first)
ORPHAN = 60.0  # seconds that a rank without its launcher gets to come to a sync point, to save and to end

children: list[Any] = []  # a launcher's processes, with a method kill(): they end with it where it ends at once

_received: set[str] = set()
_listens = 0  # the process that does; a forked one starts anew
_launcher = 0  # process id of whoever started this rank; 0 where it is no launcher, and may end before us


def listen() -> None:
    """From here on SIGNALS ask for a stop. To be called before slow imports; once is enough.

    Raises ValueError where it is not the main thread that calls: Python runs no handler in another.
    """
    global _listens, _launcher
    if _listens == os.getpid():
        return
    _received.clear()
    # Not known by RANK, which people also set by hand, in a shell that ends long before its ranks.
    launched = {"TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"} & os.environ.keys()
    _launcher = int(os.environ.get("FASHION_DDP_LAUNCHER", os.getppid() if launched else 0))
    readable, writable = os.pipe()
    os.set_blocking(writable, False)
    signal.set_wakeup_fd(writable, warn_on_full_buffer=False)
    with blocked():  # the thread takes none either: a handler that runs in it while Python takes itself apart crashes
        threading.Thread(target=_attend, args=(readable,), daemon=True).start()
    for one in SIGNALS:
        # What nohup, and a shell for its background, shut off was not meant for us.
        if not (one in (signal.SIGINT, signal.SIGHUP) and signal.getsignal(one) == signal.SIG_IGN):
            signal.signal(one, _note)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # what came while they were `blocked` comes now
    atexit.register(_ignore_signals)
    _listens = os.getpid()


def _note(number: int, frame: object) -> None:
    _received.add(signal.Signals(number).name)


def _ignore_signals() -> None:
    """The last that Python does before it gives signals their deadly meaning back: the exit code is to stay ours.

    A signal that comes while `signal.signal` takes our handler away finds none, and Python prints a traceback of it:
    the system ignores them first, then Python runs what has come, and only then lets the handlers go.
    """
    for one in SIGNALS:
        ctypes.pythonapi.PyOS_setsig(one, ctypes.c_void_p(signal.SIG_IGN))
    for one in SIGNALS:
        signal.signal(one, signal.SIG_IGN)


def _attend(readable: int) -> None:
    """What cannot wait for the main thread, which runs no handler while it waits for a rank that hangs."""
    first, orphaned, beat = 0.0, 0.0, 1.0
    while True:
        ready, _, _ = select.select([readable], [], [], beat if _launcher else None)
        if ready and signal.SIGINT in os.read(readable, 64):
            now = time.monotonic()
            if first and now - first >= AT_ONCE:
                _say("interrupted twice: ended at once; the same command continues from the last checkpoint")
                for child in children:
                    child.kill()
                os._exit(128 + signal.SIGINT)
            if not first:
                first = now
                _say("interrupted: ends when all is saved; interrupt again to end at once")
        elif not ready and os.getppid() != _launcher:
            orphaned += beat  # by beats and not by a clock, so that a process that stood still is given its time
            if orphaned > ORPHAN:  # it waits for ranks that never came, or hang
                _say("the launcher died, and no sync point came: ended; the same command continues")
                os._exit(1)


def _say(text: str) -> None:
    """One line, of one process; whoever read it may be gone."""
    if os.environ.get("RANK", "0") == "0" and "FASHION_DDP_LAUNCHER" not in os.environ:
        with contextlib.suppress(OSError):
            os.write(2, f"\n{text}\n".encode())


def stop_requests() -> list[bool]:
    """For each of REASONS, whether this rank was told so."""
    if _launcher and os.getppid() != _launcher:
        _received.add(REASONS[-1])
    return [reason in _received for reason in REASONS]


def received() -> list[signal.Signals]:
    """The signals that came."""
    return [one for one in SIGNALS if one.name in _received]


@contextlib.contextmanager
def blocked() -> Iterator[None]:
    """A process started herein gets none of SIGNALS before it listens: they would kill it in its first moments.

    A thread started herein never gets any.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
