"""Download a published dataset: from several sources, verified, and once however many processes ask for it.

$FASHION_DDP_DATA_MIRROR, the URL of a folder, comes before the public sources; http_proxy and the like are heeded.
"""

import contextlib
import fcntl
import http.client
import os
import queue
import socket
import sys
import threading
import urllib.request
from pathlib import Path

from tqdm import tqdm

from fashion_ddp.data.published import PUBLISHED, File, Form, absent, cache, named
from fashion_ddp.errors import UserError

TIMEOUT = 5.0  # seconds without a byte after which a source is given up
NO_ANSWER = (OSError, http.client.HTTPException, ValueError)  # ValueError: what is no URL


def fetch(name: str, timeout: float = TIMEOUT) -> Path:
    """Download what is missing of a published dataset into the user's cache folder; returns the files' folder.

    A file gets its name when it is whole and verified. Of processes that fetch at once, one downloads and the others
    wait for it. `timeout` is in seconds without a byte. Raises UserError where no source has a file, the cache cannot
    be written, or $FASHION_DDP_DATA_DIR names a folder, since then the cache is not looked into.
    """
    if named(None):
        raise UserError(absent(name, None))
    folder = cache() / PUBLISHED[name].folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / ".lock", "w") as lock:
            # Some cluster file systems have no locks: there a file may be downloaded twice, and is right all the same.
            with contextlib.suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_EX)
            for file in PUBLISHED[name].files:
                if not file.is_in(folder):
                    _write(folder / f"{file.name}.gz", _download(name, file, timeout))
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written ({error.strerror}): set $XDG_CACHE_HOME to a folder that can, "
            "or name one that holds the files with --data-dir"
        ) from None
    return folder


def _write(path: Path, content: bytes) -> None:
    """Give a file its content, whole or not at all."""
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _download(name: str, file: File, timeout: float) -> bytes:
    """A file as published, verified, from the first source that has it."""
    mirror = os.environ.get("FASHION_DDP_DATA_MIRROR")
    problems = []
    for base in (*([mirror] if mirror else []), *PUBLISHED[name].urls):
        url = f"{base.rstrip('/')}/{file.name}.gz"
        try:
            content = _get(url, file.gz.size, timeout)
        except NO_ANSWER as error:
            problems.append(f"{url} ({str(error).strip('<>')})")
            continue
        if (found := Form.of(content)) == file.gz:
            return content
        problems.append(f"{url} (expected {file.gz}, found {found})")
    raise UserError(f"{file.name}.gz could not be downloaded: {', '.join(problems)}; {absent(name, None)}")


def _get(url: str, size: int, timeout: float) -> bytes:
    """What a URL holds, announced as `size` bytes. Raises one of NO_ANSWER.

    A thread reads, so that no wait is longer than `timeout`: urllib's own bounds neither the look-up of a name nor
    the sum over a host's addresses, which takes most of a minute where a firewall swallows packets.
    """
    arrived: queue.SimpleQueue[bytes | Exception] = queue.SimpleQueue()

    def read() -> None:
        try:
            with urllib.request.urlopen(url, timeout=timeout) as reply:
                while chunk := reply.read1(1 << 16):
                    arrived.put(chunk)
            arrived.put(b"")
        except NO_ANSWER as error:
            arrived.put(error)

    if not sys.stderr.isatty():
        print(f"downloading {url} ({size:,} bytes)", file=sys.stderr, flush=True)
    threading.Thread(target=read, daemon=True).start()
    content = bytearray()
    with tqdm(desc=url.rpartition("/")[2], total=size, unit="B", unit_scale=True, disable=None) as bar:
        while True:
            try:
                chunk = arrived.get(timeout=timeout)
            except queue.Empty:
                raise TimeoutError(f"nothing came for {timeout:g} s") from None
            if isinstance(chunk, Exception):
                raise chunk
            if not chunk:
                return bytes(content)
            content += chunk
            bar.update(len(chunk))
