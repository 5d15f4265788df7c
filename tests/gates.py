"""Start real processes as a user does, and let them wait at a gate that a test chooses.

    with Started(tmp_path, [*TORCHRUN, *SMALL], gate("step", 30)) as run:
        pids = run.at_gate(2)      wait until two processes have come to it
        os.kill(...)               do what shall happen meanwhile
        assert run.wait() == 1     let them through, and wait for the end

The package knows nothing of gates: a sitecustomize on PYTHONPATH wraps a function, or waits in an import.
"""

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import pytest
from conftest import CHECKOUT
from faults import POINTS

PYTHON = [sys.executable, "-m", "fashion_ddp.train"]
TORCHRUN = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc-per-node", "2", *PYTHON[1:]]
ACCELERATE = [str(Path(sys.executable).parent / "accelerate"), "launch", "--cpu", *PYTHON[1:]]
LOCAL = [sys.executable, "-m", "launch.local"]

# A shell ignores these signals for its background jobs, and tests may run in one. A terminal becomes the process's own.
BEFORE = """
import fcntl, os, signal, sys, termios
for one in (signal.SIGINT, signal.SIGHUP):
    signal.signal(one, signal.SIG_DFL)
if os.isatty(0):
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execvp(sys.argv[1], sys.argv[1:])
"""

# [program, word, module, function or "" for the module's import, count]: the program is what `python -m` runs; the word
# is one of its command line.
SITE = """
import functools, importlib.util, json, os, sys, time

def program():
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec and spec.name

def stand():
    open(f".at_gate.{os.getpid()}", "w").close()
    end = time.time() + 300
    while not os.path.exists(".let_through") and time.time() < end:
        if sys.modules["fashion_ddp.distributed.signals"].received():
            open(f".told.{os.getpid()}", "w").close()
        time.sleep(0.01)

def wrap(module, path, count):
    *path, name = path.split(".")
    owner = functools.reduce(getattr, path, module)
    function, calls = getattr(owner, name), []
    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        calls.append(1)
        if len(calls) == count:
            stand()
        return function(*args, **kwargs)
    setattr(owner, name, wrapped)

class Gate:
    def find_spec(self, name, path=None, target=None):
        if name != GATE[2] or program() != GATE[0] or GATE[1] not in ["", *sys.argv]:
            return None
        sys.meta_path.remove(self)
        if not GATE[3]:
            stand()
            return None
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module
        def exec_module(module):
            execute(module)
            wrap(module, GATE[3], GATE[4])
        spec.loader.exec_module = exec_module
        return spec

GATE = json.loads(os.environ.get("GATE", "null"))
if GATE:
    sys.meta_path.insert(0, Gate())
"""


def gate(point: str, count: int = 1, program: str = "fashion_ddp.train", word: str = "") -> list[Any]:
    """Place a gate before a point of `faults.POINTS`, at its count-th call in each process, or in a module's import.

    `program`: what `python -m` runs. `word`: a word that the command line must have.
    """
    module, attribute, _ = POINTS.get(point, (*point.partition(":")[::2], ""))
    return [program, word, module, attribute, count]


class Started:
    """A command that was started in a folder. Use it in a `with`, so that nothing of it outlives the test."""

    def __init__(
        self, folder: Path, words: Sequence[str], where: list[Any] | None = None, terminal: bool = False, **env: str
    ):
        self.folder = folder
        for old in [*folder.glob(".at_gate.*"), *folder.glob(".told.*"), folder / ".let_through"]:
            old.unlink(missing_ok=True)
        (folder / "site").mkdir(exist_ok=True)
        (folder / "site" / "sitecustomize.py").write_text(SITE)
        surroundings = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
        surroundings |= {"PYTHONPATH": f"{folder / 'site'}:{CHECKOUT}", "GATE": json.dumps(where), **env}
        self.screen = folder / "screen"
        self.master = pty.openpty() if terminal else None
        output: Any = self.master[1] if self.master else open(self.screen, "ab")  # noqa: SIM115 - closed below
        streams = {"stdin": output if terminal else subprocess.DEVNULL, "stdout": output, "stderr": output}
        words = [sys.executable, "-c", BEFORE, *words]
        self.process = subprocess.Popen(words, cwd=folder, env=surroundings, start_new_session=True, **streams)
        if self.master:
            os.close(self.master[1])
            os.set_blocking(self.master[0], False)
        else:
            output.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.end()

    def read_terminal(self) -> None:
        """Add the terminal's content to what is printed. A terminal that is full would block the process."""
        if self.master:
            with contextlib.suppress(OSError), open(self.screen, "ab") as file:
                while text := os.read(self.master[0], 4096):
                    file.write(text)

    def type(self, keys: bytes) -> None:
        assert self.master
        os.write(self.master[0], keys)

    def interrupt_until_it_ends(self) -> None:
        """Type Ctrl-C again and again, as someone without patience does."""
        while self.process.poll() is None:
            self.type(b"\x03")
            self.read_terminal()
            time.sleep(0.5)
        self.until(lambda: "interrupted twice" in self.printed())

    def until(self, true: Callable[[], Any], timeout: float = 300.0) -> Any:
        """Wait until `true` returns something true, and return that."""
        end = time.monotonic() + timeout
        while not (found := true()):
            self.read_terminal()
            if time.monotonic() > end:
                self.end()
                pytest.fail(f"did not happen in {timeout:.0f} s:\n{self.printed()}", pytrace=True)
            time.sleep(0.01)
        return found

    def at_gate(self, processes: int = 1) -> list[int]:
        """Wait until so many processes have come to the gate, and return their ids."""

        def here() -> list[int]:
            assert not self.process.poll(), self.printed()
            found = [int(path.suffix[1:]) for path in self.folder.glob(".at_gate.*")]
            return found if len(found) >= processes else []

        return self.until(here)

    def told(self, processes: int = 1) -> None:
        """Wait until so many of the processes at the gate have received a signal."""
        self.until(lambda: len(list(self.folder.glob(".told.*"))) >= processes)

    def let_through(self) -> None:
        (self.folder / ".let_through").touch()

    def wait(self, timeout: float = 300.0) -> int:
        """Open the gate, wait for the command's end, and return its exit code."""
        self.let_through()
        self.until(lambda: self.process.poll() is not None, timeout)
        self.read_terminal()
        return self.process.returncode

    def printed(self) -> str:
        """Return what all commands started in this folder have printed."""
        return self.screen.read_text() if self.screen.exists() else ""

    def end(self) -> None:
        """Open the gate and kill the command. Ranks in their own sessions end by themselves without their launcher."""
        self.let_through()
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        if self.master:
            os.close(self.master[0])
            self.master = None


def living(pid: int) -> bool:
    """Return whether a process still runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
