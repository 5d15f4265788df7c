"""Record what a run was made from: its settings, the source code, the versions and the data."""

import hashlib
import importlib.metadata
import platform
import subprocess
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from fashion_ddp import user_code
from fashion_ddp.config import Config
from fashion_ddp.config.names import in_library, is_code
from fashion_ddp.errors import UserError
from fashion_ddp.files import PACKAGE
from fashion_ddp.models import weights

# What of the package computes a result. What records, shows or reads it may change, and finished runs stay as they are.
COMPUTES = ("config", "distributed", "data", "models", "training", "train.py", "user_code.py")


def code_hash() -> str:
    """Return the sha256 of the source and the recipes that compute a run."""
    found = (path for top in (PACKAGE / name for name in COMPUTES) for path in (top, *top.rglob("*")))
    ours = sorted(path for path in found if path.suffix in (".py", ".yaml"))
    return _hash(tuple((path, (stat := path.stat()).st_mtime_ns, stat.st_size) for path in ours))


def refuse_changed_code() -> None:
    """Raise UserError where that source has changed since this process first asked: it computes with the old one."""
    if code_hash() != _first_code_hash():
        raise UserError(
            "the source of fashion_ddp has changed since this process loaded it: start the process again (of a "
            "notebook, its kernel)"
        )


@cache
def _first_code_hash() -> str:
    return code_hash()


@lru_cache(maxsize=1)  # of files as they are: a submission asks once for each of its runs
def _hash(files: tuple[tuple[Path, int, int], ...]) -> str:
    digest = hashlib.sha256()
    for path, _, _ in files:
        digest.update(f"{path.relative_to(PACKAGE)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


@cache
def _version(package: str) -> str:
    return importlib.metadata.version(package)


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that compute the result."""
    return {"python": platform.python_version()} | {name: _version(name) for name in ("torch", "accelerate", "numpy")}


def git_commit() -> str | None:
    """Return the commit of the source, with `+changes` where files differ from it; None outside git."""
    submitted = PACKAGE.parent / "GIT_COMMIT"  # launch/snapshot.py writes it beside its copy of the source
    if submitted.is_file():
        return submitted.read_text() or None

    def git(*words: str) -> str:
        command = ["git", "-C", str(PACKAGE), *words]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", ".")  # it fails where an environment lies in someone else's repository
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def identity(cfg: Config) -> dict[str, Any]:
    """Return the settings that make two commands ask for the same run."""
    return {"model": cfg.model, "recipe": Path(cfg.recipe).stem, "seed": cfg.seed} | cfg.result_settings()


def made_by(cfg: Config, data_md5: dict[str, str]) -> dict[str, Any]:
    """What else must be equal for a finished run to stand for a new one."""
    made = {"code": code_hash(), **versions()}
    if is_code(cfg.model):
        made["model source"] = user_code.source_hash(cfg.model) or "not found"
    if in_library(cfg.model):
        library = cfg.model.partition(":")[0]
        made[library] = importlib.metadata.version(library)
    if cfg.init_from is not None:
        made["initial weights"] = weights.weights_hash(cfg) or ""
    return made | {"data": data_md5}


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return `name: old -> new` for each entry that differs."""
    names = [name for name in old | new if old.get(name) != new.get(name)]
    shorten = {"code": "other source files", "data": "other data files", "model source": "another source of the model"}
    shorten["initial weights"] = "other initial weights"
    return [shorten.get(name, f"{name}: {old.get(name)} -> {new.get(name)}") for name in names]
