"""Real runs on real ranks, and faults that strike them: injected from outside, at named points, by count.

    run = start(2, tmp_path, ["--model", "linear"], [Fault("step", "kill", rank=1, count=7)])
    assert run.wait() == [1, -9]

The product knows nothing of it: functions are wrapped in the rank's process before its `main` is called.
"""

import atexit
import contextlib
import ctypes
import functools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NoReturn, Self

import pytest
from conftest import _server, free_port, need

# A run of 3 epochs x 24 steps of a small cnn that learns, in a few seconds: nothing is downloaded, nothing is mirrored.
SMALL = ["--dataset", "synthetic", "--device", "cpu", "--threads", "1", "--tracker", "none", "--run-dir", "run"]
SMALL += ["--model", "cnn", "--hidden-units", "4", "--batch-size", "500", "--epochs", "3", "--optimizer", "adam"]
SMALL += ["--lr", "0.01", "--shuffle", "--checkpoint-every", "0"]
STEPS = 24  # of an epoch of it


@dataclass(frozen=True)
class Fault:
    """What happens to a rank when it comes to a point for the count-th time."""

    point: str  # of POINTS
    action: str  # of ACTIONS
    rank: int = 0
    count: int = 1

    def __str__(self) -> str:
        return f"{self.action} of rank {self.rank} at {self.point} {self.count}"

    def kind(self) -> str:
        return f"{self.action} at {self.point}"


def _hang() -> None:
    time.sleep(10**6)


def _raise() -> None:
    raise RuntimeError("an injected error")


# As torch 2.10 to 2.15 build the texts; only the names and sizes are ours.
NCCL_ERROR = """\
NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:94, unhandled system error (run with NCCL_DEBUG=INFO \
for details), NCCL version 2.27.7
ncclSystemError: System call (e.g. socket, malloc) or external library call failed or device error.\x20
Last error:
Error while creating shared memory segment /dev/shm/nccl-x (size 9637888), error: No space left on device (28)"""
FULL_CARD = """\
CUDA out of memory. Tried to allocate 20.00 MiB. GPU 1 has a total capacity of 10.75 GiB of which 8.62 MiB is free. \
Process 4711 has 9.90 GiB memory in use. Of the allocated memory 512.00 MiB is allocated by PyTorch."""


def _nccl_fails() -> None:
    from torch.distributed import DistBackendError

    raise DistBackendError(NCCL_ERROR)


def _card_is_full() -> None:
    from torch import OutOfMemoryError

    raise OutOfMemoryError(FULL_CARD)


def _send(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def _wait() -> None:
    while not os.path.exists("go"):
        time.sleep(0.01)


def _fill(leave: int) -> Callable[[], None]:
    def fill() -> None:
        with open("run/ballast", "wb", buffering=0) as ballast, contextlib.suppress(OSError):
            while ballast.write(bytes(4096)):
                pass
        os.truncate("run/ballast", max(0, os.path.getsize("run/ballast") - leave))

    return fill


def _read_only() -> None:
    remount = ["mount", "-o", "remount,ro", "none", "run"]
    while subprocess.run(remount, check=False, capture_output=True).returncode:
        time.sleep(0.05)  # it is refused while anything is being written


ACTIONS: dict[str, Callable[[], None]] = {
    "kill": _send(signal.SIGKILL),
    "stand still": _send(signal.SIGSTOP),
    **{name: _send(signal.Signals[f"SIG{name}"]) for name in ("TERM", "INT", "USR1", "USR2")},
    "raise": _raise,
    "NCCL fails": _nccl_fails,
    "card is full": _card_is_full,
    "hang": _hang,
    "wait": _wait,  # until there is a file "go" beside the run folder
    # For a run folder on a file system of its own, see `Disk`.
    "fill": _fill(leave=32_768),  # which no checkpoint fits into, but any other file that a run writes as it goes
    "fill to the last byte": _fill(leave=0),
    "make room": lambda: os.unlink("run/ballast"),
    "make read-only": _read_only,
}

# Each point: the module, the attribute in it, and whether the fault strikes before or after the call.
POINTS: dict[str, tuple[str, str, str]] = {
    "parse": ("fashion_ddp.train", "parse", "before"),
    "rendezvous": ("torch.distributed", "init_process_group", "before"),
    "met": ("torch.distributed.distributed_c10d", "_new_process_group_helper", "before"),
    "load": ("fashion_ddp.data", "load_for", "before"),
    "claim": ("fashion_ddp.training.startup", "claim", "after"),
    "step": ("fashion_ddp.training.step", "Step.__call__", "before"),
    "forward": ("fashion_ddp.training.sync", "StepRecord.write", "after"),
    "all-reduce": ("torch.distributed", "all_reduce", "before"),
    "sync point": ("fashion_ddp.training.sync", "SyncPoint.read", "before"),
    "after the sync point": ("fashion_ddp.training.sync", "SyncPoint.read", "after"),
    "save": ("fashion_ddp.training.checkpoint", "Checkpoints._save", "before"),
    "saved": ("fashion_ddp.training.checkpoint", "Checkpoints._save", "after"),
    "fsync": ("os", "fsync", "before"),
    "before a rename": ("os", "replace", "before"),
    "after a rename": ("os", "replace", "after"),
    "append": ("fashion_ddp.runs.folder", "RunFolder.append", "after"),
    "evaluation": ("fashion_ddp.training.evaluate", "Evaluation.__call__", "before"),
    "evaluated": ("fashion_ddp.training.evaluate", "Evaluation.__call__", "after"),
    "results": ("fashion_ddp.training.artifacts", "write", "before"),
    "end": ("fashion_ddp.training.recorder", "Recorder.finish", "before"),
}


def wrap(module: str, attribute: str, around: Callable[..., Any]) -> None:
    """Replace a function by around(function, *args, **kwargs)."""
    __import__(module)
    owner: Any = sys.modules[module]
    *path, name = attribute.split(".")
    for part in path:
        owner = getattr(owner, part)
    function = getattr(owner, name)

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return around(function, *args, **kwargs)

    setattr(owner, name, wrapped)


def inject(fault: Fault) -> None:
    """Make the fault strike in this process, when its time comes. Only the main thread's calls count, and of "before a
    rename of NAME" those that give a file such a name; it may hold a *."""
    point, _, name = fault.point.partition(" of ")
    module, attribute, when = POINTS[point]
    calls = 0

    def strike() -> None:
        _note("struck", str(fault))
        ACTIONS[fault.action]()

    def around(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        here = threading.current_thread() is threading.main_thread()
        here = here and (not name or fnmatch(os.path.basename(args[1]), name))
        calls += here
        mine = here and calls == fault.count
        if when == "before" and mine:
            strike()
        result = function(*args, **kwargs)
        if when == "after" and mine:
            strike()
        return result

    wrap(module, attribute, around)


def _note(file: str, text: str) -> None:
    """Leave a line beside the run folder, for whoever started the rank."""
    with contextlib.suppress(OSError), open(file, "a") as notes:
        notes.write(text + "\n")


def _note_steps_and_renames() -> None:
    def step(function: Callable[..., Any], *args: Any) -> Any:
        function(*args)
        _note("steps", "a step")

    def rename(function: Callable[..., Any], source: Any, target: Any) -> Any:
        if threading.current_thread() is threading.main_thread():
            _note("renames", os.path.basename(target))
        return function(source, target)

    wrap("fashion_ddp.training.step", "Step.__call__", step)
    wrap("os", "replace", rename)


def _rank(folder: Path, argv: list[str], env: dict[str, str], faults: Sequence[Fault], **how: Any) -> None:
    disk, images = how["disk"], how["images"]
    if disk is not None:
        disk.enter()
    os.chdir(folder)
    os.environ.update(env)
    rank = int(env["RANK"])
    printed = os.open(f"printed{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(printed, stream)
    from fashion_ddp import train
    from fashion_ddp.data import synthetic
    from fashion_ddp.distributed import signals
    from fashion_ddp.training import sync

    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell shuts off for tests in its background
    signals.listen()
    synthetic.arrays.__defaults__ = (images, images // 6)
    if how["every_step"]:  # sync points; they are a second apart otherwise
        sync.SyncPoint.__init__.__defaults__ = (0.0,)
    if rank == 0:
        _note_steps_and_renames()
    for fault in faults:
        if fault.rank == rank:
            inject(fault)
    try:
        sys.exit(train.main(argv))
    finally:
        sys.stdout.flush()


class Ranks:
    """The ranks of a run that was started, and what a launcher does with them."""

    def __init__(self, folder: Path, processes: list[Any]):
        self.folder, self.processes = folder, processes

    def send(self, number: int, rank: int | None = None) -> None:
        """A signal to one rank, or to all that live."""
        for at, process in enumerate(self.processes):
            if rank in (None, at) and process.is_alive():
                with contextlib.suppress(ProcessLookupError):  # it has ended since
                    os.kill(process.pid, number)

    def wait(self, timeout: float = 300.0, patience: float = 20.0) -> list[int]:
        """The ranks' exit codes; -n where signal n killed it. As launchers do, a rank that fails ends the others:
        asked first, killed when `patience` is over."""
        limit, kill = time.monotonic() + timeout, float("inf")
        while any(process.is_alive() for process in self.processes):
            if any(process.exitcode for process in self.processes) and kill == float("inf"):
                kill = time.monotonic() + patience
                self.send(signal.SIGTERM)
            if time.monotonic() > min(kill, limit):
                self.send(signal.SIGKILL)
                if time.monotonic() > limit:
                    pytest.fail(f"did not end in {timeout:.0f} s:\n{self.printed()}")
            time.sleep(0.005)
        return [process.exitcode for process in self.processes]

    def printed(self) -> str:
        """What all ranks printed, in all starts of this folder."""
        return "".join(path.read_text() for path in sorted(self.folder.glob("printed*")))

    def errors(self) -> list[str]:
        """The lines on the screen that tell of something wrong."""
        return [line for line in self.printed().splitlines() if line.startswith(("error: ", "warning: ", "Traceback"))]

    def noted(self, what: str) -> list[str]:
        """Of all starts in this folder: the faults that "struck"; of rank 0 the "steps" it took, the "renames" that
        it made."""
        path = self.folder / what
        return path.read_text().splitlines() if path.exists() else []


def start(
    world_size: int,
    folder: Path,
    words: Sequence[str] = (),
    faults: Sequence[Fault] = (),
    every_step: bool = True,
    images: int = 12_000,
    disk: "Disk | None" = None,
    **env: str,
) -> Ranks:
    """Start SMALL, with more words, in a folder, on so many ranks and training images. `disk`: what `run` is on."""
    place = {"WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1"}
    place |= {"MASTER_PORT": free_port()}
    processes = []
    for rank in range(world_size):
        mine = {k: str(v) for k, v in {**place, "RANK": rank, "LOCAL_RANK": rank, **env}.items()}
        how = {"every_step": every_step, "images": images, "disk": disk}
        process = _server.Process(target=_rank, args=(folder, [*SMALL, *words], mine, list(faults)), kwargs=how)
        process.start()
        atexit.register(process.kill)  # of a test that failed; Python itself would wait for it
        processes.append(process)
    return Ranks(folder, processes)


def start_tiny(world_size: int, folder: Path, words: Sequence[str] = (), *args: Any, **kwargs: Any) -> Ranks:
    """Start a run of 3 epochs x 8 steps that takes a second with its start."""
    return start(world_size, folder, ["--batch-size", "250", *words], *args, images=2_000, **kwargs)


TINY_STEPS = 8  # of an epoch of it


class Disk:
    """A real file system of 1 MB as the run folder of `start`'s folder, for as long as the `with` lasts.

    Mounted in a namespace of its own, which ranks enter, so that no root is needed where users may make namespaces.
    """

    def __init__(self, folder: Path):
        self.folder, self.pid = folder, 0
        (folder / "run").mkdir()

    def __enter__(self) -> Self:
        need("unshare")
        need("nsenter")
        mount = f"mount -t tmpfs -o size=1m none '{self.folder}/run' && echo mounted && exec sleep 3600"
        self.holder = subprocess.Popen(["unshare", "-Urm", "sh", "-c", mount], stdout=subprocess.PIPE, text=True)
        self.pid = self.holder.pid
        assert self.holder.stdout is not None
        if self.holder.stdout.readline() != "mounted\n":
            self.__exit__()
            lacking("the right to mount")
        return self

    def __exit__(self, *_: object) -> None:
        self.holder.kill()
        self.holder.communicate()

    def __getstate__(self) -> dict[str, Any]:
        return {"pid": self.pid}

    def enter(self) -> None:
        """Make this process, of one thread, see it."""
        for kind in ("user", "mnt"):
            namespace = os.open(f"/proc/{self.pid}/ns/{kind}", os.O_RDONLY)
            if ctypes.CDLL(None, use_errno=True).setns(namespace, 0):
                raise OSError(ctypes.get_errno(), f"cannot enter the {kind} namespace")
            os.close(namespace)

    @property
    def seen(self) -> Path:
        """`start`'s folder as it looks from inside."""
        return Path(f"/proc/{self.pid}/root{self.folder}")

    def remount(self, how: str) -> None:
        enter = ["nsenter", "--preserve-credentials", "-U", "-m", "-t", str(self.pid)]
        subprocess.run([*enter, "mount", "-o", f"remount,{how}", "none", f"{self.folder}/run"], check=True)


def ranks_of(folder: Path, variable: str = "SUBMITIT_LOCAL_GLOBALID") -> list[int]:
    """The process ids of the ranks of jobs below a folder, by rank, which this variable of theirs tells."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_text().split("\0")
            variables = dict(v.split("=", 1) for v in (path / "environ").read_text().split("\0") if "=" in v)
        except (OSError, UnicodeDecodeError):
            continue
        if "submitit.core._submit" in words and str(folder) in words[-2] and variable in variables:
            found[int(variables[variable])] = int(path.name)
    return [found[rank] for rank in sorted(found)]


def lacking(what: str) -> NoReturn:
    """Skip a test for want of something; fail it where everything must run."""
    (pytest.fail if os.environ.get("FASHION_DDP_REQUIRE_ALL") else pytest.skip)(f"{what} is missing here")
    raise AssertionError


def eventually(what: Callable[[], object], within: float = 60.0) -> None:
    """Wait until something holds, for so many seconds at most."""
    limit = time.monotonic() + within
    while not what():
        assert time.monotonic() < limit, "it never came to that"
        time.sleep(0.01)


def summary(folder: Path) -> dict[str, Any]:
    """The record of the run that `start` made in a folder."""
    return json.loads((folder / "run" / "summary.json").read_text())


def wrong(folder: Path, reference: Path) -> list[str]:
    """What is wrong with a finished run, measured by an uninterrupted one of the same command; each a folder that
    `start` was given."""
    run, whole = folder / "run", reference / "run"
    try:
        record = summary(folder)
        starts = json.loads((run / "environment.json").read_text())
    except (OSError, ValueError) as error:
        return [str(error)]
    found = []
    if record["status"] != "finished" or "error" in record:
        found.append(f"status {record['status']!r}, error {record.get('error')!r}")
    if record["starts"] != len(starts):
        found.append(f"{record['starts']} starts in summary.json, {len(starts)} in environment.json")
    for name in ("model.safetensors", "predictions.safetensors", "examples.safetensors", "steps.jsonl", "model.txt"):
        if not (run / name).exists() or (run / name).read_bytes() != (whole / name).read_bytes():
            found.append(f"{name} differs from the uninterrupted run's")
    if _epochs(run) != _epochs(whole):
        found.append(f"metrics.jsonl differs from the uninterrupted run's: {_epochs(run)}, not {_epochs(whole)}")
    found += [f"{path.relative_to(run)} was left" for path in run.rglob(".*")]
    return found


def _epochs(run: Path) -> list[Any]:
    """The rows of metrics.jsonl without what depends on the clock."""
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    rows = [json.loads(line) if line.endswith("\n") else line for line in lines]
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "throughput/"))} for row in rows]
