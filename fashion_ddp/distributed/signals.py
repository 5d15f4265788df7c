"""Notice that this process must stop: because of a signal, or because its launcher died.

A handler that saved or talked to other ranks would do so in the middle of a step, on one rank. So it only records the
signal. At the next sync point the ranks exchange what they received, save at the same step, and end together. A
launcher records signals in the same way and passes them on.
"""

import atexit
import contextlib
import ctypes
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
REASONS = (*(one.name for one in SIGNALS), "the launcher died")
SECOND_INTERRUPT = 2.0  # seconds; a later second SIGINT means "now" (a terminal and a launcher may both send the first)
ORPHAN_TIMEOUT = 60.0  # seconds that a rank without its launcher gets to reach a sync point, to save and to end

children: list[Any] = []  # a launcher's processes, with a method kill(): killed where the launcher ends at once

_received: set[str] = set()
_listening_pid = 0  # the process that called `listen`; a forked process must call it again
_leave: Callable[[str], int] | None = None  # what ends this process at once while it starts
_leaving = threading.Lock()
_training_since = 0.0
_met = False  # whether ranks exchanged requests to stop since then
_interrupted = 0.0  # time.monotonic() of the first SIGINT of a process that is not ours to end
_launcher = 0  # process id of the launcher; 0 where the parent is none and may end before us


def listen() -> None:
    """Record SIGNALS from now on, as requests to stop. Call it before slow imports; further calls do nothing.

    Raises ValueError outside of the main thread, because Python runs handlers only there.
    """
    global _listening_pid
    if _listening_pid == os.getpid():
        return
    _begin()
    readable, writable = os.pipe()
    os.set_blocking(writable, False)
    signal.set_wakeup_fd(writable, warn_on_full_buffer=False)
    with blocked():  # for this thread, too: a handler that runs in it while Python shuts down crashes
        threading.Thread(target=_watch, args=(readable,), daemon=True).start()
    for one in _handled():
        signal.signal(one, _record)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # signals that came while `blocked` are delivered now
    atexit.register(_ignore_signals)
    _listening_pid = os.getpid()


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Record SIGNALS within, in a process that is not ours to end: a second SIGINT raises KeyboardInterrupt.

    Does nothing in a process that listens as a whole. Outside of the main thread no signal is recorded.
    """
    if _listening_pid == os.getpid():
        yield
        return
    _begin()
    before = {}
    if threading.current_thread() is threading.main_thread():
        # One that is not Python's (faulthandler.register) could not be put back: it stays.
        replaced = [one for one in _handled() if signal.getsignal(one) is not None]
        before = {one: signal.signal(one, _record_or_interrupt) for one in replaced}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def _begin() -> None:
    """Forget what came before, and find out whether a launcher started this process."""
    global _interrupted, _launcher
    _received.clear()
    _interrupted = 0.0
    # RANK does not show a launcher: people also set it by hand, in a shell that ends long before its ranks.
    launched = {"TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"} & os.environ.keys()
    _launcher = int(os.environ.get("FASHION_DDP_LAUNCHER", os.getppid() if launched else 0))


def _handled() -> list[signal.Signals]:
    """Return SIGNALS without those that are to be ignored: nohup, and a shell for its background jobs, ignore two."""
    ignored = [one for one in (signal.SIGINT, signal.SIGHUP) if signal.getsignal(one) == signal.SIG_IGN]
    return [one for one in SIGNALS if one not in ignored]


def leave_while_starting(leave: Callable[[str], int]) -> None:
    """Let any of SIGNALS end this process at once, until `training_begins`.

    For a job, of which all ranks get it: nothing is to be saved yet, and the first sync point may be further away than
    the time that is left. `leave` is given the signal's name, in another thread than the main one, which may be at
    anything; it returns the exit code.
    """
    global _leave
    with _leaving:
        _leave = leave
    leave_if_asked()


def leave_if_asked(patience: float = 0.0) -> None:
    """End this process where it starts and one of SIGNALS came, or comes within `patience` seconds: as that of another
    rank did, which is gone."""
    limit = time.monotonic() + patience
    while _leave is not None:
        for one in received():
            _leave_now(one.name)
        if time.monotonic() >= limit:
            break
        time.sleep(0.05)


def training_begins() -> None:
    """From now on signals are requests to stop at a sync point."""
    global _leave, _training_since, _met
    with _leaving:
        _leave, _training_since, _met = None, time.time(), False


def training_since() -> float:
    """Return when this process began to train, in seconds since the epoch; 0 where it did not yet."""
    return _training_since


def _leave_now(name: str) -> None:
    with _leaving:  # where training begins meanwhile, it waits here until this process is gone
        if _leave is not None:
            code = os.EX_TEMPFAIL
            try:
                code = _leave(name)
                sys.stdout.flush()
            finally:
                os._exit(code)


def _record(number: int, frame: object) -> None:
    _received.add(signal.Signals(number).name)


def _record_or_interrupt(number: int, frame: object) -> None:
    global _interrupted
    now = time.monotonic()
    if number == signal.SIGINT and _interrupted and now - _interrupted >= SECOND_INTERRUPT:
        raise KeyboardInterrupt
    if number == signal.SIGINT and not _interrupted:
        _interrupted = now
    _record(number, frame)


def _ignore_signals() -> None:
    """Ignore SIGNALS at the end of the process, so that none changes the exit code once Python restores the defaults.

    A signal that comes while `signal.signal` replaces our handler finds none, and Python prints a traceback. So the
    system ignores them first; then Python runs handlers for signals that already came, and only then drops them.
    """
    for one in SIGNALS:
        ctypes.pythonapi.PyOS_setsig(one, ctypes.c_void_p(signal.SIG_IGN))
    for one in SIGNALS:
        signal.signal(one, signal.SIG_IGN)


def _watch(readable: int) -> None:
    """End the process at a second SIGINT, or when its launcher is dead and no sync point comes.

    Runs in a thread, because the main thread runs no handler while it waits for a rank that hangs.
    """
    first, orphaned, beat = 0.0, 0.0, 1.0
    while True:
        ready, _, _ = select.select([readable], [], [], beat if _launcher else None)
        came = os.read(readable, 64) if ready else b""
        for number in came:
            if number in SIGNALS:  # others may have handlers of their own, such as Submitit's for SIGCONT
                _leave_now(signal.Signals(number).name)
        if signal.SIGINT in came:
            now = time.monotonic()
            if first and now - first >= SECOND_INTERRUPT:
                _say("interrupted twice: ended at once; the same command continues from the last checkpoint")
                for child in children:
                    child.kill()
                os._exit(128 + signal.SIGINT)
            if not first:
                first = now
                _say("interrupted: ends when all is saved; interrupt again to end at once")
        elif not ready and os.getppid() != _launcher:
            orphaned += beat  # counted in beats, so that a process that was paused still gets its time
            if orphaned > ORPHAN_TIMEOUT:  # it waits for ranks that never came, or hang
                _say("the launcher died, and no sync point came: ended; the same command continues")
                os._exit(1)


def _say(text: str) -> None:
    """Print a line from one process only; the reader may be gone."""
    if os.environ.get("RANK", "0") == "0" and "FASHION_DDP_LAUNCHER" not in os.environ:
        with contextlib.suppress(OSError):
            os.write(2, f"\n{text}\n".encode())


def stop_requests() -> list[bool]:
    """Return, for each of REASONS, whether this rank must stop for it."""
    global _met
    _met = _met or _training_since > 0
    if _launcher and os.getppid() != _launcher:
        _received.add(REASONS[-1])
    return [reason in _received for reason in REASONS]


def asked_as_training_began() -> str | None:
    """Return why this rank must stop, if it was asked before ranks met for the first time: another one that was asked a
    moment earlier, while it started, has left at once."""
    return reason(name in _received for name in REASONS) if _training_since and not _met else None


def reason(requests: Iterable[object]) -> str | None:
    """Return the first of REASONS whose place in `requests` is not 0 or False; None without any."""
    return next((why for why, asked in zip(REASONS, requests, strict=True) if asked), None)


def received() -> list[signal.Signals]:
    """Return the signals that came."""
    return [one for one in SIGNALS if one.name in _received]


@contextlib.contextmanager
def blocked() -> Iterator[None]:
    """Block SIGNALS in this thread.

    A process started meanwhile gets none before it calls `listen`: they would kill it in its first moments. A thread
    started meanwhile never gets any.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
