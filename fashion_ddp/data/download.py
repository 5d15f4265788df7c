"""Download a published dataset from one of several sources, verify it, and do so once for all processes that ask.

$FASHION_DDP_DATA_MIRROR, the URL of a folder, is tried before the public sources. http_proxy and the like are used.
"""

import http.client
import os
import queue
import sys
import threading
import urllib.request
from pathlib import Path

from tqdm import tqdm

from fashion_ddp.data.published import (
    PUBLISHED,
    Fingerprint,
    IdxFile,
    cache_folder,
    chosen_folder,
    missing_files_message,
)
from fashion_ddp.errors import UserError
from fashion_ddp.files import one_at_a_time, write_whole

TIMEOUT = 5.0  # seconds without a byte, after which the next source is tried
DOWNLOAD_ERRORS = (OSError, http.client.HTTPException, ValueError)  # ValueError: not a URL


def fetch(name: str, timeout: float = TIMEOUT) -> Path:
    """Download the missing files of a published dataset into the user's cache folder, and return the files' folder.

    A file gets its name only when it is complete and verified. If several processes call this at the same time, one
    downloads and the others wait. `timeout` is in seconds without a byte. Raises UserError where no source has a file,
    the cache cannot be written, or $FASHION_DDP_DATA_DIR names a folder, because then the cache is not searched.
    """
    if chosen_folder(None):
        raise UserError(missing_files_message(name, None))
    folder = cache_folder() / PUBLISHED[name].folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with one_at_a_time(folder / ".lock"):
            for file in PUBLISHED[name].files:
                if not file.exists_in(folder):
                    write_whole(folder / f"{file.name}.gz", _download(name, file, timeout))
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written ({error.strerror}): set $XDG_CACHE_HOME to a folder that can, "
            "or name one that holds the files with --data-dir"
        ) from None
    return folder


def _download(name: str, file: IdxFile, timeout: float) -> bytes:
    """Return a packed file's content, verified, from the first source that has it."""
    mirror = os.environ.get("FASHION_DDP_DATA_MIRROR")
    problems = []
    for base in (*([mirror] if mirror else []), *PUBLISHED[name].urls):
        url = f"{base.rstrip('/')}/{file.name}.gz"
        try:
            content = _read_url(url, file.gz.size, timeout)
        except DOWNLOAD_ERRORS as error:
            problems.append(f"{url} ({str(error).strip('<>')})")
            continue
        if (found := Fingerprint.from_bytes(content)) == file.gz:
            return content
        problems.append(f"{url} (expected {file.gz}, found {found})")
    raise UserError(
        f"{file.name}.gz could not be downloaded: {', '.join(problems)}; {missing_files_message(name, None)}"
    )


def _read_url(url: str, size: int, timeout: float) -> bytes:
    """Return the content of a URL; `size` in bytes is only for the progress bar. Raises one of DOWNLOAD_ERRORS.

    A thread reads, so that no wait is longer than `timeout` seconds: urllib's own timeout limits neither the look-up of
    a name nor the sum over a host's addresses, which takes most of a minute where a firewall drops packets.
    """
    arrived: queue.SimpleQueue[bytes | Exception] = queue.SimpleQueue()

    def read() -> None:
        try:
            with urllib.request.urlopen(url, timeout=timeout) as reply:
                while chunk := reply.read1(1 << 16):
                    arrived.put(chunk)
            arrived.put(b"")
        except DOWNLOAD_ERRORS as error:
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
