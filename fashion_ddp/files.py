"""Write files atomically, do work in one process at a time, and say where this package lies."""

import contextlib
import errno
import fcntl
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

PACKAGE = Path(__file__).parent


def write_whole(path: Path, content: str | bytes, before_replace: Callable[[], object] = lambda: None) -> None:
    """Replace a file atomically: a reader, also after a crash, finds the old content or the new, never a part of it.

    `before_replace` is called when the new content is on disk under a temporary name. If it raises, the old file stays.
    Raises OSError where the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        before_replace()
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # without it, a machine that crashes may lose the new name
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # this file system cannot sync folders
            raise
    finally:
        os.close(folder)


@contextlib.contextmanager
def one_at_a_time(path: Path, when_busy: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Let one process at a time in, by a lock on the file `path`. Its end, however it comes, opens the lock.

    `when_busy` is called before waiting for another process; what it raises is raised. Some cluster file systems have
    no locks: there nobody waits, and the work must bear to be done twice. Raises OSError where the file cannot be
    written.
    """
    with open(path, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            when_busy()
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:
            pass
        yield
