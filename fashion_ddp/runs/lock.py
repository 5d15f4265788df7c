"""Who works in a run folder: one process at a time, known by a file of its own that it touches while it lives.

A process first leaves its file and then looks for others': of two that come at once, on whatever machines, at least
one sees the other and goes. That needs nothing but files, where flock is no answer: network file systems refuse it or
keep it to one machine, and a process that hangs would hold it for ever. A lock that was not touched for a minute, by
the file system's own clock, holds nothing; nor does that of a process which this machine no longer has.
"""

import contextlib
import fcntl
import json
import os
import random
import socket
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fashion_ddp.errors import TrainingFailed, UserError

NAME = ".lock"  # `.lock.<token>` is a lock, `.lock-<token>` a file that is soon to go
STALE = 60.0  # seconds without a touch after which a lock holds nothing
LOOKS = 5  # at a folder that seems to be held, before its holder is believed


@dataclass(frozen=True)
class Lock:
    """A run folder that this process works in. No other process writes its file, so nothing here can meet another's."""

    folder: Path
    token: str

    @property
    def path(self) -> Path:
        return self.folder / f"{NAME}.{self.token}"

    def touch(self) -> None:
        """Say that this process lives. To be called far more often than every STALE seconds."""
        with contextlib.suppress(OSError):  # a file system that is away for a while; `check` tells what came of it
            os.utime(self.path)

    def is_there(self) -> bool:
        try:
            os.close(os.open(self.path, os.O_RDONLY))  # asks a file server, which `exists` may not
        except FileNotFoundError:
            return False
        return True

    def check(self) -> None:
        """Raises TrainingFailed where another process has taken the folder, while this one stood still."""
        if not self.is_there():
            by = holder(self.folder)
            what = f"was taken by {by} while this process stood still" if by else "was taken away, moved or removed"
            raise TrainingFailed(f"{self.folder} {what}: nothing more is written there")

    def release(self) -> None:
        with contextlib.suppress(OSError):
            self.path.unlink()


def take(folder: Path) -> Lock:
    """Take a folder for this process, made where it is missing. Raises UserError where another one holds it."""
    lock = Lock(folder, uuid.uuid4().hex)
    by: dict[str, Any] | None = {}
    for look in range(LOOKS):
        time.sleep(look * random.uniform(0.05, 0.25))  # whoever is there may be about to go, having seen this one
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with _in_turn(folder) as in_turn:
                by = _try(lock)
        except (FileNotFoundError, FileExistsError):  # it is being moved by a process that keeps it under another name
            if look + 1 == LOOKS:
                raise
            continue
        if by is None:
            return lock
        if in_turn and _is_here(by):  # then it came before, and stays
            break
    raise UserError(f"{folder} is in use by {_name(by or {})}: wait for it, or choose another --run-dir")


def _try(lock: Lock) -> dict[str, Any] | None:
    """Leave a lock and look for others: None where there is none that lives; else the lock is gone again."""
    try:
        _leave(lock)
        others = {path: found for path, found in _locks(lock.folder).items() if path != lock.path}
        living = [found for path, found in others.items() if _lives(path, found)]
        # Looked for last: a folder that was moved meanwhile took all locks with it.
        if not living and lock.is_there():
            for path in others:
                path.unlink(missing_ok=True)
            return None
    except BaseException:
        lock.release()
        raise
    lock.release()
    return living[0] if living else {}


def holder(folder: Path) -> str | None:
    """The process that works in a run folder, in words; None where there is none that lives."""
    return next((_name(found) for path, found in _locks(folder).items() if _lives(path, found)), None)


@contextlib.contextmanager
def _in_turn(folder: Path) -> Iterator[bool]:
    """Let the processes of one machine look one after another, so that of those who come at once one gets the folder.

    False where they cannot, or where one stands still in its turn: then chance decides.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        yield _flock(handle, folder)
    finally:
        os.close(handle)


def _flock(handle: int, folder: Path) -> bool:
    for _ in range(200):
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return os.path.samestat(os.fstat(handle), folder.stat())  # else it was moved, and another has its name
        except BlockingIOError:
            time.sleep(0.01)
        except OSError:
            break
    return False


def _leave(lock: Lock) -> None:
    """Make a lock's file, complete from its first moment."""
    me = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    temporary = lock.folder / f"{NAME}-{lock.token}"
    try:
        temporary.write_text(json.dumps(me | {"machine": _machine(), "born": _born(os.getpid())}))
        os.replace(temporary, lock.path)
    finally:
        temporary.unlink(missing_ok=True)


def _locks(folder: Path) -> dict[Path, dict[str, Any]]:
    """The lock files of a folder and what they say; nothing, of one that cannot be read."""
    return {path: _read(path) for path in folder.glob(f"{NAME}.*")}


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _name(found: dict[str, Any]) -> str:
    known = all(found.get(key) for key in ("pid", "host", "since"))
    return "process {pid} on {host} since {since}".format(**found) if known else "another process"


def _lives(path: Path, found: dict[str, Any]) -> bool:
    """Whether a lock holds: its process is not known to have ended, and it was touched within a minute."""
    if _is_here(found) and _ended(found.get("pid"), found.get("born")):
        return False
    try:
        return _now(path.parent) - path.stat().st_mtime < STALE
    except FileNotFoundError:  # released meanwhile
        return False
    except OSError:
        return True


def _is_here(found: dict[str, Any]) -> bool:
    """Whether a lock's process is one of this machine."""
    machine = _machine()
    return machine is not None and found.get("machine") == machine


def _ended(pid: Any, born: Any) -> bool:
    """Whether a process of this machine, begun at the time `born`, is certainly no more."""
    try:
        os.kill(pid, 0)  # which tells of processes that /proc may hide from us
    except ProcessLookupError:
        return True
    except (OSError, TypeError, OverflowError):  # another user's; or no process id
        pass
    now = _born(pid)
    return None not in (now, born) and now != born


def _born(pid: Any) -> str | None:
    """When a process of this machine began, which with its id makes it unique; None where that cannot be seen."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "ended" if stat[0] in "ZX" else stat[19]
    except OSError:
        return None


def _machine() -> str | None:
    """This machine since it was started, and this container on it: where a process id means one process."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return None


def _now(folder: Path) -> float:
    """The time by the clock that the folder's files are dated with."""
    probe = folder / f"{NAME}-{uuid.uuid4().hex}"
    try:
        probe.touch()
        return probe.stat().st_mtime
    except OSError:  # read-only, or full
        return time.time()
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()
