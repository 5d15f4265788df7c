"""Write files atomically, and say where this package lies."""

import errno
import os
import uuid
from collections.abc import Callable
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
