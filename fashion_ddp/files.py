"""Files that are whole at every moment, and where this package lies."""

import errno
import os
import uuid
from collections.abc import Callable
from pathlib import Path

PACKAGE = Path(__file__).parent


def write_whole(path: Path, content: str | bytes, last_look: Callable[[], object] = lambda: None) -> None:
    """Replace a file so that a reader, or a crash, finds the old content or the new, never a part.

    `last_look` may raise when all is written but the new name, which keeps the old file.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        last_look()
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # else the new name itself may be lost with the machine
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that knows no such thing
            raise
    finally:
        os.close(folder)
