"""A copy of the code as it is submitted: what queued jobs run, whatever is edited before they start, or start again."""

import importlib.util
import os
import shutil
import sys
import sysconfig
from pathlib import Path

from fashion_ddp import provenance
from fashion_ddp.config import PACKAGE
from fashion_ddp.errors import UserError

LARGEST = 100e6  # bytes of a user's package
OURS = (PACKAGE, Path(__file__).parent)


def take(to: Path, models: list[str]) -> None:
    """Copy this package, and the packages or modules of users' models (package.module:Name), into a new folder."""
    for package in (*OURS, *users_code(models)):
        if package.is_dir():
            shutil.copytree(package, to / package.name, ignore=_left_out)
        else:
            shutil.copy(package, to)
    # Git would tell the checkout's commit at the time of asking.
    (to / "GIT_COMMIT").write_text(provenance.git_commit() or "")


def users_code(models: list[str]) -> list[Path]:
    """Where the code of users' models lies: each one's package or module, unless it is installed in the environment.

    Raises UserError for a package too large to be copied for every submission.
    """
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as the run itself will
    installed = [Path(sysconfig.get_paths()[name]).resolve() for name in ("stdlib", "purelib", "platlib")]
    found = []
    for name in dict.fromkeys(model.partition(":")[0].partition(".")[0] for model in models if ":" in model):
        spec = importlib.util.find_spec(name)
        if spec is None or name in (package.name for package in OURS):
            continue
        path = Path(next(iter(spec.submodule_search_locations or [spec.origin or ""]))).resolve()
        if not path.exists() or any(folder in path.parents for folder in installed):
            continue
        size = sum(file.stat().st_size for file in _files(path)) if path.is_dir() else 0
        if size > LARGEST:
            raise UserError(
                f"{path} is copied for every submission, with {size / 1e6:,.0f} MB: put the model into a module, or a "
                "package, that holds no data"
            )
        found.append(path)
    return found


def _left_out(folder: str, names: list[str]) -> set[str]:
    return {name for name in names if name == "__pycache__" or name.startswith(".")}


def _files(folder: Path) -> list[Path]:
    found = []
    for here, folders, names in os.walk(folder):
        folders[:] = set(folders) - _left_out(here, folders)
        found += [Path(here, name) for name in set(names) - _left_out(here, names)]
    return found
