"""Find the file of weights that a run starts from, and its hash. transfer.py reads it; this module needs no torch."""

from pathlib import Path

from fashion_ddp.config import Config
from fashion_ddp.errors import UserError
from fashion_ddp.models import pretrained


def weights_file(cfg: Config) -> Path | None:
    """Return the file of the run's initial weights; None where they are random.

    Raises UserError where the file is missing, or is damaged (known of published weights).
    """
    if cfg.init_from is None:
        return None
    if cfg.init_from == "pretrained":
        return _published(cfg.model)
    path = Path(cfg.init_from)
    if path.is_dir() and not (path / "config.yaml").is_file():
        raise UserError(f"init_from {path}: is no run folder: name one, or a file of weights")
    file = path / "model.safetensors" if path.is_dir() else path
    if not file.is_file():
        why = "the run is not finished" if path.is_dir() else "name a file of weights, a run's folder, or pretrained"
        raise UserError(f"init_from {path}: {file.absolute()} is not there: {why}")
    return file


def weights_hash(cfg: Config) -> str | None:
    """Return the sha256 of the file of the run's initial weights; None where they are random."""
    path = weights_file(cfg)
    try:
        return None if path is None else pretrained.sha256(path)
    except OSError as error:
        raise UserError(f"init_from {path}: cannot be read ({error.strerror}): fix that, or name another") from None


def _published(model: str) -> Path:
    """Return the file of a library's model in the cache of torch, or of the Hugging Face hub."""
    from fashion_ddp.models import library  # imports torch

    file = library.published(model)
    path = file.find()
    if path is None:
        raise UserError(
            f"init_from pretrained: the weights of {model} are not on this machine: where there is a network (a login "
            f"node), run `python -m fashion_ddp.weights {model}`"
        )
    pretrained.check_digest(file, path)
    return path
