"""Copy the code at submission, so that jobs run it even if it is edited before they start, or start again."""

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
OUR_PACKAGES = (PACKAGE, Path(__file__).parent)


def take(to: Path, names: list[str]) -> None:
    """Copy our packages and those of the user's models and datasets into a new folder.

    `names`: of models and datasets; those that are `package.module:Name` are the user's.
    """
    for package in (*OUR_PACKAGES, *user_packages(names)):
        if package.is_dir():
            shutil.copytree(package, to / package.name, ignore=_ignored)
        else:
            shutil.copy(package, to)
    # A job that asked git would get the commit of the checkout as it is then.
    (to / "GIT_COMMIT").write_text(provenance.git_commit() or "")


def user_packages(names: list[str]) -> list[Path]:
    """Return the packages or modules of the user's models and datasets that are not installed in the environment.

    Raises UserError for a package that is too large to be copied for every submission.
    """
    user_code.add_current_folder_to_path()  # as the run itself will
    installed = [Path(sysconfig.get_paths()[name]).resolve() for name in ("stdlib", "purelib", "platlib")]
    found = []
    for name in dict.fromkeys(re.split("[.:]", one)[0] for one in names if is_code(one)):
        spec = importlib.util.find_spec(name)
        if spec is None or name in (package.name for package in OUR_PACKAGES):
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


def _ignored(folder: str, names: list[str]) -> set[str]:
    return {name for name in names if name == "__pycache__" or name.startswith(".")}


def _files(folder: Path) -> list[Path]:
    found = []
    for here, folders, names in os.walk(folder):
        folders[:] = set(folders) - _ignored(here, folders)
        found += [Path(here, name) for name in set(names) - _ignored(here, names)]
    return found
