"""Whether data fits: memory that can still be had, and a refusal with both sizes."""

import contextlib
from pathlib import Path

from fashion_ddp.errors import UserError


def free() -> int | None:
    """Bytes of this machine's memory that can still be had: what is available, and a container's limit (cgroup v2).
    None where the system does not tell."""
    found = []
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found.append(1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")))
    with contextlib.suppress(OSError, ValueError, KeyError):
        group = Path("/sys/fs/cgroup")
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        found.append(limit - used + int(stat["file"]))  # the cache of files makes room
    return min(found, default=None)


def require(what: str, needed: int, free: int | None, on: str = "this machine") -> None:
    """Raises UserError, with both sizes, where something does not fit into the memory that is free."""
    if free is not None and needed > free:
        raise UserError(
            f"{what} takes {needed / 1e9:,.2f} GB, and {free / 1e9:,.2f} GB of memory are free on {on}: take fewer or "
            "smaller images, fewer ranks on the machine, or another machine"
        )
