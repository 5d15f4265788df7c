"""What every test stands on: the real data, a home that means harm, and ranks that start in a fifth of a second."""

import atexit
import contextlib
import fcntl
import functools
import itertools
import multiprocessing
import os
import pickle
import pty
import runpy
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import termios
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest

# Tests compute little and run two at once: threads would wait for each other. Ranks are told their number themselves.
os.environ["OMP_NUM_THREADS"] = "1"

CHECKOUT = Path(__file__).parent.parent

# Where Python is told to keep no bytecode (PYTHONDONTWRITEBYTECODE, as in images of containers), each of the hundreds
# of processes that tests start would compile all of torch anew: 2.5 s of a core each. They keep it here instead, but
# for that of the copies that earlier tests made.
if sys.dont_write_bytecode:
    bytecode = CHECKOUT / ".pytest_cache" / "bytecode"
    os.environ |= {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(bytecode)}
    for copies in bytecode.joinpath(*Path(tempfile.gettempdir()).parts[1:]).glob("pytest-of-*"):
        shutil.rmtree(copies, ignore_errors=True)

# One pool for all tests: a process forked from this server has torch and Accelerate loaded, where a fresh one, and
# above all a launcher's, spends seconds on them.
_server = multiprocessing.get_context("forkserver")
# What test files import is among it: a rank imports the file that its function is in.
_server.set_forkserver_preload(
    ["fashion_ddp.train", "torch", "accelerate", "torch._dynamo", "fashion_ddp.training.checkpoint"]
    + ["pytest", "torchmetrics.classification", "safetensors.torch", "torch.profiler"]
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the tests that may take longest: no process is left alone with one when the others are done."""

    def limit(item: pytest.Item) -> float:
        marker = item.get_closest_marker("timeout")
        return float(marker.args[0]) if marker else 900.0  # as in pyproject.toml

    items.sort(key=limit, reverse=True)


@pytest.hookimpl(optionalhook=True)  # where xdist is not installed, nobody asks
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With --dist loadgroup one process has all tests on SLURM, which are the first; the others go to who is free.

    The marks that xdist has for this do nothing in pytest 9.2.
    """
    if config.getoption("dist") != "loadgroup":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class BesideSlurm(LoadScopeScheduling):  # which begins with the largest group
        def _split_scope(self, nodeid: str) -> str:
            return "on SLURM" if "/test_slurm.py::" in nodeid else nodeid

    return BesideSlurm(config, log)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of the real Fashion-MNIST."""
    folder = Path(os.environ.get("FASHION_DDP_DATA_DIR", CHECKOUT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.fail(f"{folder} does not exist: set FASHION_DDP_DATA_DIR to a folder with the four files")
    return folder


@pytest.fixture(scope="session", autouse=True)
def hostile_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A home whose Accelerate file asks for another engine, without a W&B account; and an environment without the
    user's own settings for either."""
    home = tmp_path_factory.mktemp("home")
    folder = home / ".cache" / "huggingface" / "accelerate"
    folder.mkdir(parents=True)
    (folder / "default_config.yaml").write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: 'NO'\ndynamo_config: {dynamo_backend: INDUCTOR}\n"
        "mixed_precision: bf16\nnum_machines: 1\nnum_processes: 2\ngpu_ids: '0,1'\nuse_cpu: false\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.startswith(("WANDB_", "ACCELERATE_", "HF_HOME", "XDG_", "FASHION_DDP_RUNS", "SLURM_")):
                patch.delenv(name)
        patch.setenv("HOME", str(home))
        yield home


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny run on 2 ranks that nothing struck."""
    from faults import start_tiny

    folder = tmp_path_factory.mktemp("uninterrupted")
    assert start_tiny(2, folder).wait() == [0, 0]
    return folder


def need(program: str) -> None:
    """Skip a test whose program is not installed; fail it where everything must run."""
    if shutil.which(program) is None:
        cannot_run(f"{program} is not installed")


def cannot_run(why: str) -> NoReturn:
    """Skip a test; fail it where everything must run."""
    (pytest.fail if os.environ.get("FASHION_DDP_REQUIRE_ALL") else pytest.skip)(why)


def made_once(path: Path, make: Callable[[Path], Any]) -> Path:
    """Return a file or folder that is made once for all processes of the tests."""
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            make(path.with_suffix(".new"))
            path.with_suffix(".new").rename(path)
    return path


@pytest.fixture(scope="session")
def common(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all processes of the tests share."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture(scope="session")
def stand_in_library(common: Path) -> Path:
    """The stand-in for CUDA, for all processes of the tests."""
    from stand_in import build, headers

    need("c++")
    if not headers():
        cannot_run("this build of torch brings no headers of CUDA")
    return made_once(common / "libcuda.so.1", build)


@pytest.fixture
def stand_in(stand_in_library: Path, tmp_path: Path) -> Any:
    """Commands on stand-in cards."""
    from stand_in import StandIn

    return StandIn(stand_in_library, tmp_path)


@functools.cache
def _ports() -> Iterator[int]:
    """Ports that no other process of any tests gets: this one owns a hundred of them while it listens at the first.
    They lie below those that launchers draw (from 20,000) and those that Linux gives to connections (from 32,768)."""
    for first in range(10_000, 20_000, 100):
        guard = socket.socket()
        try:
            guard.bind(("", first))
            guard.listen()
        except OSError:
            guard.close()
            continue
        _ports.guard = guard  # type: ignore[attr-defined]
        return itertools.cycle(range(first + 1, first + 100))
    raise AssertionError("every port from 10000 to 20000 is taken")


def free_port() -> int:
    """A port of this process's own where nobody listens."""
    for port in _ports():
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as who listens there
            probe.bind(("", port))
            return port
    raise AssertionError


def _rank(env: dict[str, str], work: bytes, answer: Any) -> None:
    os.environ.update(env)
    try:
        function, args = pickle.loads(work)
        result = function(*args), None
    except BaseException:  # noqa: BLE001 - told by the caller
        result = None, traceback.format_exc()
    # As plain bytes: multiprocessing would send tensors as files that end with this process.
    answer.send_bytes(pickle.dumps(result))


def ranks(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Call function(*args) in so many real ranks over gloo; their results by rank. The function is of a module."""
    place = {"WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1"}
    place |= {"MASTER_PORT": free_port()}
    processes, answers = [], []
    for rank in range(world_size):
        env = {k: str(v) for k, v in {**place, "RANK": rank, "LOCAL_RANK": rank}.items()}
        here, there = _server.Pipe(duplex=False)
        process = _server.Process(target=_rank, args=(env, pickle.dumps((function, args)), there), daemon=True)
        process.start()
        there.close()
        processes.append(process)
        answers.append(here)
    results = [_receive(answer) for answer in answers]
    for process in processes:
        process.join()
    if errors := [f"rank {rank}: {error}" for rank, (_, error) in enumerate(results) if error]:
        pytest.fail("\n".join(errors), pytrace=False)
    return [result for result, _ in results]


def _receive(answer: Any) -> tuple[Any, str | None]:
    try:
        return pickle.loads(answer.recv_bytes())
    except EOFError:
        return None, "died without an answer"


def command(*words: str, cwd: Path, timeout: float = 600, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a program of this environment by name, or this Python's `-m`, as a user would; its output as text."""
    program = Path(sys.executable).parent / words[0]
    line = [str(program) if program.exists() else words[0], *words[1:]]
    surroundings = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")} | env
    return subprocess.run(line, check=False, cwd=cwd, env=surroundings, capture_output=True, text=True, timeout=timeout)


def _as_main(module: str, words: tuple[str, ...], cwd: Path, env: dict[str, str], files: list[str]) -> None:
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    for stream, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), stream)
    sys.path.insert(0, str(cwd))
    sys.modules.pop(module, None)
    sys.argv = [module, *words]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()  # as a Python of its own would, and not one that multiprocessing started


def forked(module: str, *words: str, cwd: Path, timeout: float = 600, **env: str) -> subprocess.CompletedProcess[str]:
    """What `python -m module words` does, in a process of its own that has torch loaded: it starts seconds sooner."""
    surroundings = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")} | env
    with tempfile.TemporaryDirectory() as folder:
        files = [f"{folder}/out", f"{folder}/err"]
        process = _server.Process(target=_as_main, args=(module, words, cwd, surroundings, files))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
        out, err = (Path(file).read_text() if os.path.exists(file) else "" for file in files)
    return subprocess.CompletedProcess([module, *words], process.exitcode, out, err)


def on_a_terminal(*line: str, cwd: Path, stdout: int | None = None, **env: str) -> tuple[int, bytes]:
    """The exit code of a program on a terminal on which nothing is ever typed, and what it shows there. `stdout`: where
    that goes instead."""
    ours, its = pty.openpty()
    termios.tcsetwinsize(its, (24, 80))
    streams: dict[str, Any] = {"stdin": its, "stdout": stdout or its, "stderr": its}
    surroundings = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")} | env
    shown = b""
    with subprocess.Popen(line, cwd=cwd, env=surroundings | {"PYTHONPATH": str(CHECKOUT)}, **streams) as process:
        os.close(its)
        with contextlib.suppress(OSError):  # the program has closed its end
            while select.select([ours], [], [], 60)[0]:  # a question would leave the terminal silent
                shown += os.read(ours, 65536)
            process.kill()
    os.close(ours)
    return process.returncode, shown
