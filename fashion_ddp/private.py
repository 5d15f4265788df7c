"""Use what another library keeps private: any version may have it no more, which is then told in one message."""

import importlib.metadata
from typing import Any

from fashion_ddp.errors import UserError

# Of the libraries whose private names are used: the versions in requirements/, which a test compares.
TESTED = {"accelerate": ("1.15.0",), "submitit": ("1.5.4",), "torch": ("2.10.0", "2.15.0"), "wandb": ("0.31.0",)}


def private(owner: Any, name: str) -> Any:
    """Return the attribute `name` of something that a library in TESTED made: a module, a class or an object.

    Raises UserError where the installed version has none.
    """
    try:
        return getattr(owner, name)
    except AttributeError:
        home = getattr(owner, "__module__", None) or owner.__name__
        raise UserError(untested(home.partition(".")[0], f"has no {name}, which is used here")) from None


def untested(package: str, what: str) -> str:
    """Return a message: what the installed version of a library does, and which versions were tested."""
    tested = TESTED[package]
    return (
        f"{package} {importlib.metadata.version(package)} {what}. Tested with {package} {' and '.join(tested)}: "
        f"pip install '{package}=={tested[-1]}'"
    )
