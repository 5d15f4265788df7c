"""Train image classifiers with DistributedDataParallel and compare them honestly."""

import importlib.util
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fashion_ddp.runs.reading import load_run as load_run
    from fashion_ddp.train import fit as fit

__version__ = "0.1.0"

NEEDED = ("torch", "accelerate", "numpy", "yaml")  # without one of these no command of ours runs

if getattr(sys, "argv", [])[:1] == ["-m"]:  # so it is while Python looks for the module that it is to run
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"error: {sys.executable} has no {', '.join(missing)}: activate the environment that `make setup` makes "
            "(source .venv/bin/activate), or call its Python",
            file=sys.stderr,
        )
        sys.exit(2)


def __getattr__(name: str) -> Any:
    """Import `fashion_ddp.load_run` and `fit` when they are used: help and error messages do not need them."""
    if name == "load_run":
        from fashion_ddp.runs.reading import load_run

        return load_run
    if name == "fit":
        from fashion_ddp.train import fit

        return fit
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
