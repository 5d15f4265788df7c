"""Start processes that have torch and Accelerate loaded: a fork takes milliseconds where imports take seconds.

A server loads what others wrote, before any process touches a card, and nothing of this project or of the user: each
process reads those files anew. Otherwise a process is as separate as one that was started by itself: a child of who
asked for it, in a session of its own, with its own environment, output, signals and exit code, and named in the
system's list by what it does. Neither notices when the other ends.

    with ForkServer() as server:
        process = server.start("fashion_ddp.train", ["--model", "linear"], env, output)

Linux alone lets the server do this; elsewhere each process loads everything itself.
"""

import atexit
import contextlib
import ctypes
import importlib
import os
import runpy
import shlex
import shutil
import signal
import site
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing import Pipe, reduction
from multiprocessing.connection import Connection
from typing import Any, BinaryIO, ClassVar, NoReturn, Protocol, Self

from fashion_ddp.distributed import signals, tuning

# What a rank imports of other packages.
LOADED = (
    "numpy",
    "torch",
    "torch._dynamo",
    "torch.utils.flop_counter",
    "accelerate",
    "safetensors.torch",
    "torchmetrics.classification",
    "tqdm",
    "yaml",
)
COMPILER = ("torch._inductor.compile_fx", "torch._inductor.standalone_compile")  # with --compile, too
MODULE = "launch.fork_server"
LIMIT = 60  # seconds that each of them may take
LOOK = 0.02  # seconds between two looks whether a process has ended
ROOM = 4096  # bytes for the command line that the system's list of processes shows; Linux shows no more
PR_SET_CHILD_SUBREAPER = 36  # of Linux's prctl: orphans below this process become its children


class Process(Protocol):
    """A child of this process: what is used of subprocess.Popen."""

    pid: int

    def poll(self) -> int | None: ...
    def wait(self) -> int: ...
    def send_signal(self, number: int, /) -> None: ...
    def kill(self) -> None: ...


class Start(Protocol):
    """Starts `python -m module argv`, as `start_process` does."""

    def __call__(
        self, module: str, argv: Sequence[str], env: Mapping[str, str], output: BinaryIO | None = None
    ) -> Process: ...


def start_process(
    module: str, argv: Sequence[str], env: Mapping[str, str], output: BinaryIO | None = None
) -> subprocess.Popen[bytes]:
    """Start `python -m module argv` in a session of its own, so that Ctrl-C on the terminal does not reach it.

    `output`: where it prints; None is this process's terminal. It gets none of SIGNALS before it listens.
    """
    command = [sys.executable, "-m", module, *argv]
    with signals.blocked():
        return subprocess.Popen(command, env=env, stdout=output, stderr=output, start_new_session=True)


class ForkedProcess:
    """A child that the server forked."""

    def __init__(self, pid: int):
        self.pid = pid
        self.code: int | None = None  # -n where signal n killed it
        self._lock = threading.Lock()  # a second Ctrl-C lets another thread kill it, which asks too

    def poll(self) -> int | None:
        with self._lock:
            if self.code is None:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                self.code = os.waitstatus_to_exitcode(status) if pid else None
            return self.code

    def wait(self) -> int:
        while (code := self.poll()) is None:
            time.sleep(LOOK)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:  # else another process may have its number by now
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(9)


class ForkServer:
    """A process that loads packages once, and forks itself for each process that is to be started."""

    def __init__(self, also: Sequence[str] = ()) -> None:
        """Start the server. It loads while this process goes on. `also`: packages beside those of LOADED."""
        self._words = [*LOADED, *also]
        self._server: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._loaded = False
        self._packages: dict[str, int] = {}
        self._begin()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def start(
        self, module: str, argv: Sequence[str], env: Mapping[str, str], output: BinaryIO | None = None
    ) -> Process:
        """Start a process as `start_process` does."""
        if self._packages != _installed():  # a package was added, removed or changed meanwhile
            self.close()
            self._begin()
        if self._server and self._connection:
            with contextlib.suppress(OSError, EOFError), _adopting() as possible:
                self._loaded = self._loaded or self._connection.recv()
                if possible:
                    request = module, list(argv), dict(env), os.getcwd(), os.getpid(), output is not None
                    self._connection.send(request)
                    if output:
                        reduction.send_handle(self._connection, output.fileno(), self._server.pid)
                    if pid := self._connection.recv():
                        return ForkedProcess(pid)
            self.close()  # it could not load or fork, was killed, or is not possible here
        return start_process(module, argv, env, output)

    def close(self) -> None:
        """End the server. What it forked goes on."""
        if self._connection and self._server:
            self._connection.close()
            if not self._loaded:
                self._server.kill()
            self._server.wait()
        self._connection = self._server = None

    def _begin(self) -> None:
        self._packages, self._loaded = _installed(), False
        if not sys.platform.startswith("linux"):
            return
        self._connection, theirs = Pipe()
        words = [sys.executable, "-m", MODULE, str(theirs.fileno()), " " * ROOM, *self._words]
        with signals.blocked(), theirs:
            self._server = subprocess.Popen(words, pass_fds=[theirs.fileno()], start_new_session=True)


def _installed() -> dict[str, int]:
    """Return when what is installed was last changed, by folder."""
    folders = [*site.getsitepackages(), site.getusersitepackages()]
    return {folder: os.stat(folder).st_mtime_ns for folder in folders if os.path.isdir(folder)}


@contextlib.contextmanager
def _adopting() -> Iterator[bool]:
    """Become the parent of processes below this one whose own parent ends. Yields whether the system can do that."""

    def adopt(yes: bool) -> bool:
        return ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, int(yes), 0, 0, 0) == 0

    try:
        yield adopt(True)
    finally:
        adopt(False)


# --- The server -------------------------------------------------------------------------------------------------
def serve(connection: Connection) -> tuple[Any, int | None]:
    """Fork for each request. Returns in the forked processes alone, with the request and the file to print to."""
    while True:
        try:
            request = connection.recv()
            *_, has_output = request
            output = reduction.recv_handle(connection) if has_output else None
        except (EOFError, OSError):  # who asked has ended
            for folder in OfTheServer.made:
                shutil.rmtree(folder.name, ignore_errors=True)
            end(0)
        *_, parent, _ = request
        if (first := os.fork()) == 0:
            middle = os.getpid()
            try:
                if os.fork():
                    os._exit(0)  # so that the second is an orphan, whom who asked adopts
            except OSError:  # no room for another process
                give_up(connection)
            while os.getppid() == middle:
                time.sleep(0.0005)
            if os.getppid() != parent:  # who asked has ended, or could not adopt it
                give_up(connection)
            connection.send(os.getpid())
            connection.close()
            return request, output
        os.waitpid(first, 0)
        if output is not None:
            os.close(output)


def give_up(connection: Connection) -> NoReturn:
    """End this process, and let who asked, if it is there, start one in another way."""
    with contextlib.suppress(OSError):
        connection.send(0)
    os._exit(1)


def rename(words: Sequence[str]) -> None:
    """Show these words as this process's command line, where `ps` and `pgrep -f` look: in the room of the server's."""
    with open("/proc/self/stat") as file:
        start, end = map(int, file.read().rpartition(")")[2].split()[45:47])  # arg_start, arg_end
    line = shlex.join(words).encode(errors="surrogateescape")[: end - start - 2]
    # Where the last byte is not 0, Linux takes the rest for one text, which the first 0 ends.
    ctypes.memmove(start, line.ljust(end - start - 1, b"\0") + b" ", end - start)


class OfTheServer(tempfile.TemporaryDirectory[str]):
    """A folder that a package makes as it is loaded, as W&B does. A process that ends leaves it to the others."""

    made: ClassVar[list[Any]] = []

    def __init__(self, *args: Any, **more: Any):
        super().__init__(*args, **more)
        self._finalizer.detach()  # type: ignore[attr-defined]
        self.made.append(self)

    def cleanup(self) -> None:
        """Do nothing: the server removes it when it ends."""


def load(packages: Sequence[str]) -> None:
    """Import packages. One that is missing, broken or takes too long is left to the processes, which say so."""

    def too_long(*_: object) -> NoReturn:
        raise TimeoutError

    usual, tempfile.TemporaryDirectory = tempfile.TemporaryDirectory, OfTheServer  # type: ignore[assignment, misc]
    signal.signal(signal.SIGALRM, too_long)
    with tuning.gc_paused():  # what is loaded stays out of it, else each process's first would copy its memory
        for package in packages:
            before = set(sys.modules)
            signal.alarm(LIMIT)
            try:
                importlib.import_module(package)
            except Exception:  # noqa: BLE001 - whatever it raises
                for name in set(sys.modules) - before:
                    del sys.modules[name]
            finally:
                signal.alarm(0)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    tempfile.TemporaryDirectory = usual  # type: ignore[misc]


def run_as_main(module: str) -> NoReturn:
    """Run a module as `python -m` does, to the end of the process."""
    code = 0
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException:  # noqa: BLE001 - Python's last resort
        sys.excepthook(*sys.exc_info())
        code = 1
    end(code)


def end(code: int) -> NoReturn:
    """End this process as Python does, but for taking apart all that is loaded, which takes seconds."""
    threading._shutdown()  # type: ignore[attr-defined] # waits for threads
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, AttributeError, ValueError):  # closed, or nobody reads it
            stream.flush()
    os._exit(code & 0xFF)


def main() -> NoReturn:
    connection = Connection(int(sys.argv[1]))
    load(sys.argv[3:])
    started_in = os.getcwd()
    connection.send(True)
    # From Python 3.12 on. The threads of numpy's OpenBLAS, which it means, end by themselves before a fork.
    warnings.filterwarnings("ignore", "This process .* is multi-threaded, use of fork", DeprecationWarning)
    (module, argv, env, folder, _, _), output = serve(connection)
    os.setsid()
    if output is not None:
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.close(output)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(folder)
    rename([sys.executable, "-m", module, *argv])
    # Each process draws numbers of its own, as Python's own random does by itself.
    if "torch" in sys.modules:
        sys.modules["numpy"].random.seed()
        sys.modules["torch"].default_generator.seed()
    if sys.path[0] == started_in:  # Python may be told not to look there
        sys.path[0] = folder
    importlib.invalidate_caches()
    for name in [name for name in sys.modules if name.split(".")[0] in ("fashion_ddp", "launch")]:
        del sys.modules[name]
    sys.argv = [module, *argv]
    run_as_main(module)


if __name__ == "__main__":
    main()
