"""Find the file of weights that a run starts from, and its hash. transfer.py reads it; this module needs no torch."""

import hashlib
import os
from pathlib import Path

from fashion_ddp.config import Config
from fashion_ddp.errors import UserError

# torchvision's file of ImageNet weights by model; its name ends with the first digits of its sha256.
IMAGENET = {"resnet18": "resnet18-f37072fd.pth"}
URL = "https://download.pytorch.org/models/"


def weights_file(cfg: Config) -> Path | None:
    """Return the file of the run's initial weights; None where they are random.

    Raises UserError where the file is missing, or is damaged (known for ImageNet's).
    """
    if cfg.init_from is None:
        return None
    if cfg.init_from == "imagenet":
        return _imagenet(cfg.model)
    path = Path(cfg.init_from)
    if path.is_dir() and not (path / "config.yaml").is_file():
        raise UserError(f"init_from {path}: is no run folder: name one, or a file of weights")
    file = path / "model.safetensors" if path.is_dir() else path
    if not file.is_file():
        why = "the run is not finished" if path.is_dir() else "name a file of weights, a run's folder, or imagenet"
        raise UserError(f"init_from {path}: {file.absolute()} is not there: {why}")
    return file


def weights_hash(cfg: Config) -> str | None:
    """Return the sha256 of the file of the run's initial weights; None where they are random."""
    path = weights_file(cfg)
    return None if path is None else _sha256(path)


def _sha256(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"init_from {path}: cannot be read ({error.strerror}): fix that, or name another") from None


def _imagenet(model: str) -> Path:
    """Return the path of ImageNet's weights in torch's own cache, where torchvision looks for them, too."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torch"
    path = Path(os.environ.get("TORCH_HOME") or cache) / "hub" / "checkpoints" / IMAGENET[model]
    if not path.is_file():
        raise UserError(
            f"init_from imagenet: {path} is not there: where there is a network (a login node), run "
            f"`curl --create-dirs -o {path} {URL}{path.name}`; or put the file anywhere and name it with --init-from"
        )
    if not (found := _sha256(path)).startswith(path.stem.rpartition("-")[2]):
        raise UserError(f"{path} is damaged: its sha256 starts {found[:8]}: delete it and fetch {URL}{path.name} again")
    return path
