"""Lock a run folder, so that one process at a time works in it.

A process writes a lock file of its own and touches it while it lives. It writes the file first and then looks for other
lock files: of two processes that come at the same time, on any machines, at least one sees the other and gives up. This
needs only files. flock is no solution: network file systems refuse it or keep it to one machine, and a process that
hangs would hold it for ever. A lock is void if it was not touched for a minute, by the file system's own clock, or if
its process was on this machine and has ended.
"""

import contextlib
import fcntl
import json
import os
import random
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fashion_ddp.errors import TrainingFailed, UserError

NAME = ".lock"  # `.lock.<token>` is a lock, `.lock-<token>` a temporary file
STALE = 60.0  # seconds without a touch after which a lock is void
ATTEMPTS = 5  # before a folder that seems to be locked is given up


@dataclass(frozen=True)
class Lock:
    """This process's lock on a run folder. No other process writes its file."""

    folder: Path
    token: str

    @property
    def path(self) -> Path:
        return self.folder / f"{NAME}.{self.token}"

    def touch(self) -> None:
        """Show that this process lives. Call it far more often than every STALE seconds."""
        with contextlib.suppress(OSError):  # the file system may be away for a while; `check` notices a lost lock
            os.utime(self.path)

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Touch the lock often enough within, from a thread."""
        done = threading.Event()

        def keep() -> None:
            while not done.wait(STALE / 4):
                self.touch()

        thread = threading.Thread(target=keep)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def exists(self) -> bool:
        try:
            os.close(os.open(self.path, os.O_RDONLY))  # asks the file server; Path.exists may answer from a cache
        except FileNotFoundError:
            return False
        return True

    def check(self) -> None:
        """Raise TrainingFailed where this process was paused and another one has taken the folder meanwhile."""
        if not self.exists():
            by = holder(self.folder)
            what = f"was taken by {by} while this process stood still" if by else "was taken away, moved or removed"
            raise TrainingFailed(f"{self.folder} {what}: nothing more is written there")

    def release(self) -> None:
        with contextlib.suppress(OSError):
            self.path.unlink()


def acquire(folder: Path) -> Lock:
    """Lock a folder for this process, and make it if it is missing.

    Raises UserError where another process has locked it, OSError where it cannot be written.
    """
    lock = Lock(folder, uuid.uuid4().hex)
    other: dict[str, Any] | None = {}
    for attempt in range(ATTEMPTS):
        time.sleep(attempt * random.uniform(0.05, 0.25))  # the other process may be giving up, because it saw this one
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with _one_at_a_time(folder) as alone:
                other = _try_to_acquire(lock)
        except (FileNotFoundError, FileExistsError):  # another process with --fresh is moving the folder
            if attempt + 1 == ATTEMPTS:
                raise
            continue
        if other is None:
            return lock
        if alone and _is_on_this_machine(other):  # it came first, and keeps the folder
            break
    raise UserError(f"{folder} is in use by {_process_text(other or {})}: wait for it, or choose another --run-dir")


def acquire_within(folder: Path, seconds: float) -> Lock:
    """Lock a folder, and wait so long for another process to release it. Raises as `acquire` does."""
    limit = time.monotonic() + seconds
    while True:
        try:
            return acquire(folder)
        except UserError:
            if time.monotonic() > limit:
                raise
        time.sleep(1)


def _try_to_acquire(lock: Lock) -> dict[str, Any] | None:
    """Write the lock and look for others. Return None if it holds; else remove it and return what another lock says."""
    try:
        _write_lock_file(lock)
        others = {path: found for path, found in _read_locks(lock.folder).items() if path != lock.path}
        living = [found for path, found in others.items() if _is_alive(path, found)]
        # Last, check that the lock still exists: if the folder was moved meanwhile, all locks went with it.
        if not living and lock.exists():
            for path in others:
                path.unlink(missing_ok=True)
            return None
    except BaseException:
        lock.release()
        raise
    lock.release()
    return living[0] if living else {}


def holder(folder: Path) -> str | None:
    """Return in words which process works in a run folder; None if none does."""
    return next((_process_text(found) for path, found in _read_locks(folder).items() if _is_alive(path, found)), None)


@contextlib.contextmanager
def _one_at_a_time(folder: Path) -> Iterator[bool]:
    """Let the processes of one machine try one after another, so that one of them gets the folder.

    Yields False where this is not possible, or another process is stuck in its try: then chance decides.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        yield _try_flock(handle, folder)
    finally:
        os.close(handle)


def _try_flock(handle: int, folder: Path) -> bool:
    """Try for two seconds to flock an open folder. Return whether it worked and the folder still has its name."""
    for _ in range(200):
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return os.path.samestat(os.fstat(handle), folder.stat())
        except BlockingIOError:
            time.sleep(0.01)
        except OSError:
            break
    return False


def _write_lock_file(lock: Lock) -> None:
    """Write the lock's file atomically."""
    me = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    temporary = lock.folder / f"{NAME}-{lock.token}"
    try:
        temporary.write_text(json.dumps(me | {"machine": _machine_id(), "born": _start_time(os.getpid())}))
        os.replace(temporary, lock.path)
    finally:
        temporary.unlink(missing_ok=True)


def _read_locks(folder: Path) -> dict[Path, dict[str, Any]]:
    """Return the lock files of a folder with their content; {} for one that cannot be read."""
    return {path: _read_lock(path) for path in folder.glob(f"{NAME}.*")}


def _read_lock(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _process_text(found: dict[str, Any]) -> str:
    known = all(found.get(key) for key in ("pid", "host", "since"))
    return "process {pid} on {host} since {since}".format(**found) if known else "another process"


def _is_alive(path: Path, found: dict[str, Any]) -> bool:
    """Return whether a lock holds: its process is not known to have ended, and it was touched within a minute."""
    if _is_on_this_machine(found) and _has_ended(found.get("pid"), found.get("born")):
        return False
    try:
        return _file_system_time(path.parent) - path.stat().st_mtime < STALE
    except FileNotFoundError:  # the lock was released meanwhile
        return False
    except OSError:
        return True


def _is_on_this_machine(found: dict[str, Any]) -> bool:
    """Return whether a lock's process is on this machine."""
    machine = _machine_id()
    return machine is not None and found.get("machine") == machine


def _has_ended(pid: Any, born: Any) -> bool:
    """Return whether the process of this machine that started at the time `born` has certainly ended."""
    try:
        os.kill(pid, 0)  # signal 0 also finds processes that /proc hides
    except ProcessLookupError:
        return True
    except (OSError, TypeError, OverflowError):  # another user's process, or no process id
        pass
    now = _start_time(pid)
    return None not in (now, born) and now != born


def _start_time(pid: Any) -> str | None:
    """Return when a process of this machine started, which with its id makes it unique; None if that is hidden."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "ended" if stat[0] in "ZX" else stat[19]
    except OSError:
        return None


def _machine_id() -> str | None:
    """Return an id of this boot of the machine and of this container: within it, process ids are unique."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return None


def _file_system_time(folder: Path) -> float:
    """Return the time by the clock of the folder's file system."""
    probe = folder / f"{NAME}-{uuid.uuid4().hex}"
    try:
        probe.touch()
        return probe.stat().st_mtime
    except OSError:  # read-only, or full
        return time.time()
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()
