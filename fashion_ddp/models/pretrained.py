"""Find published weights in the caches of torch and of the Hugging Face hub, or fetch them into these."""

import hashlib
import os
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from urllib.parse import urlparse

from fashion_ddp.errors import UserError


@dataclass(frozen=True)
class TorchFile:
    """A file that torch fetches from a URL. Its name ends with the first digits of its sha256."""

    url: str

    def __str__(self) -> str:
        return self.url

    @property
    def path(self) -> Path:
        """Where torch keeps it: below $TORCH_HOME."""
        from torch import hub

        return Path(hub.get_dir()) / "checkpoints" / os.path.basename(urlparse(self.url).path)

    def find(self) -> Path | None:
        """Return the file; None where it is not there."""
        return self.path if self.path.is_file() else None

    def digest(self, path: Path) -> str | None:
        """Return the beginning of the sha256 that the file must have; None where it is not known."""
        end = path.stem.rpartition("-")[2]
        return end if len(end) >= 8 and set(end) <= set("0123456789abcdef") else None

    def fetch(self) -> Path:
        """Download the file into torch's cache, verify it and return it."""
        from torch import hub

        self.path.parent.mkdir(parents=True, exist_ok=True)
        hub.download_url_to_file(self.url, str(self.path), self.digest(self.path), progress=sys.stderr.isatty())
        return self.path


@dataclass(frozen=True)
class HubFile:
    """A file of a repository on the Hugging Face hub."""

    repository: str
    name: str | None = None

    def __str__(self) -> str:
        return f"{self.repository} on the Hugging Face hub"

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,) if self.name else ("model.safetensors", "pytorch_model.bin")

    def find(self) -> Path | None:
        """Return the file in the hub's cache ($HF_HOME); None where it is not there."""
        from huggingface_hub import try_to_load_from_cache

        found = (try_to_load_from_cache(self.repository, name) for name in self.names)
        return next((Path(path) for path in found if isinstance(path, str)), None)

    def digest(self, path: Path) -> str | None:
        """Return the sha256 that the file must have; None where it is not known."""
        name = path.resolve().name  # the cache's own file is called by it
        return name if len(name) == 64 else None

    def fetch(self) -> Path:
        """Download the file into the hub's cache and return it."""
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError

        for name in self.names:
            try:
                return Path(hf_hub_download(self.repository, name))
            except EntryNotFoundError as error:
                missing = error
        raise missing


def fetch(file: TorchFile | HubFile) -> Path:
    """Download a file of weights into the cache where `find` looks, and return it. Raises UserError if it fails."""
    try:
        return file.fetch()
    except Exception as error:  # what each library raises differs
        raise UserError(
            f"{file} could not be fetched ({type(error).__name__}: {' '.join(str(error).split())}): run this where "
            "there is a network (behind a proxy HTTPS_PROXY, for a mirror of the hub HF_ENDPOINT)"
        ) from error


def sha256(path: Path) -> str:
    """Return the sha256 of a file, which is read once as long as it stays as it is. Raises OSError."""
    stat = path.stat()
    return _sha256(path, stat.st_mtime_ns, stat.st_size)


@cache
def _sha256(path: Path, modified: int, size: int) -> str:
    with open(path, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def check_digest(file: TorchFile | HubFile, path: Path) -> str:
    """Return the sha256 of a file of weights. Raises UserError where it is not the one that it must have."""
    found = sha256(path)
    if not found.startswith(must := file.digest(path) or ""):
        raise UserError(
            f"{path} is damaged: its sha256 starts {found[:8]}, not {must[:8]}: delete it and fetch it again "
            "(python -m fashion_ddp.weights)"
        )
    return found
