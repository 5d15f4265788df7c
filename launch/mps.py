"""Let runs that share a card compute at the same time: NVIDIA's MPS. Without it they take turns on the card.

https://docs.nvidia.com/deploy/mps
"""

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from fashion_ddp.console import say

CONTROL = "nvidia-cuda-mps-control"
PROC = Path("/proc")
LIMIT = 30.0  # seconds that the daemon gets to start, and to end


@contextlib.contextmanager
def running(needed: bool) -> Iterator[dict[str, str]]:
    """Run MPS's daemon until the block ends, where it is needed, installed and nobody runs one. Yields the variables
    with which processes find it; none where there is nothing to be found."""
    if not needed:
        yield {}
        return
    if shutil.which(CONTROL) is None:
        say(f"{CONTROL} is not installed: runs on the same card take turns")
        yield {}
        return
    if "CUDA_MPS_PIPE_DIRECTORY" in os.environ or _somebody_runs_it():
        say("runs on the same card share it by the MPS that is running")
        yield {}
        return
    with tempfile.TemporaryDirectory(prefix="mps-") as folder:
        variables = {"CUDA_MPS_PIPE_DIRECTORY": folder, "CUDA_MPS_LOG_DIRECTORY": folder}
        # Which cards are visible is left to the runs: the daemon would number anew those that it sees itself.
        env = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"} | variables
        if (problem := _ask([CONTROL, "-d"], env)) is not None:
            say(f"{CONTROL} did not start ({problem}): runs on the same card take turns")
            yield {}
            return
        say("runs on the same card share it by MPS, which ends with them")
        try:
            yield variables
        finally:
            if (problem := _ask([CONTROL], env, "quit\n")) is not None:
                say(f"{CONTROL} did not end ({problem}): end it with `echo quit | {CONTROL}`")


def _somebody_runs_it() -> bool:
    for path in PROC.glob("[0-9]*/comm"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if path.read_text().startswith("nvidia-cuda-mps"):  # the system keeps 15 letters
                return True
    return False


def _ask(words: list[str], env: dict[str, str], text: str = "") -> str | None:
    """Run a program. Returns why it failed; None where it did not."""
    try:
        done = subprocess.run(
            words,
            check=False,
            env=env,
            input=text,
            capture_output=True,
            text=True,
            timeout=LIMIT,
            start_new_session=True,  # Ctrl-C is not for it
        )
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)
    return None if done.returncode == 0 else (done.stderr.strip() or f"exit code {done.returncode}")
