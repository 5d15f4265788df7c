"""Train image classifiers with DistributedDataParallel and compare them honestly."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fashion_ddp.runs.reading import load_run as load_run

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import `fashion_ddp.load_run` when it is used: help and error messages do not need it."""
    if name == "load_run":
        from fashion_ddp.runs.reading import load_run

        return load_run
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
