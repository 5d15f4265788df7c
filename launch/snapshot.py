"""A copy of the code as it is submitted: what queued jobs run, whatever is edited before they start, or start again."""

import importlib.util
import os
import re
import shutil
import sysconfig
from pathlib import Path

from fashion_ddp import user_code
from fashion_ddp.config.names import is_code
from fashion_ddp.errors import UserError
from fashion_ddp.files import PACKAGE
from fashion_ddp.runs import provenance

LARGEST = 100e6  # bytes of a user's package
OURS = (PACKAGE, Path(__file__).parent)


def take(to: Path, names: list[str]) -> None:
    """Copy this package, and the packages or modules of users' models and datasets (those names that are
    package.module:Name), into a new folder."""
    for package in (*OURS, *users_code(names)):
        if package.is_dir():
            shutil.copytree(package, to / package.name, ignore=_left_out)
        else:
            shutil.copy(package, to)
    # Git would tell the checkout's commit at the time of asking.
    (to / "GIT_COMMIT").write_text(provenance.git_commit() or "")


def users_code(names: list[str]) -> list[Path]:
    """Where the code of users' models and datasets lies: each one's package or module, unless it is installed in the
    environment.

    Raises UserError for a package too large to be copied for every submission.
    """
    user_code.add_current_folder_to_path()  # as the run itself will
    installed = [Path(sysconfig.get_paths()[name]).resolve() for name in ("stdlib", "purelib", "platlib")]
    found = []
    for name in dict.fromkeys(re.split("[.:]", one)[0] for one in names if is_code(one)):
        spec = importlib.util.find_spec(name)
        if spec is None or name in (package.name for package in OURS):
            continue
        path = Path(next(iter(spec.submodule_search_locations or [spec.origin or ""]))).resolve()
        if not path.exists() or any(folder in path.parents for folder in installed):
            continue
        size = sum(file.stat().st_size for file in _files(path)) if path.is_dir() else 0
        if size > LARGEST:
            raise UserError(
                f"{path} is copied for every submission, with {size / 1e6:,.0f} MB: put what is used into a module, or "
                "a package, that holds no data"
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
