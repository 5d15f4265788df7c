"""Who works in a run folder: two real processes, or eight, at every wrong moment; and machines that are not here."""

import contextlib
import fcntl
import json
import multiprocessing
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fashion_ddp.errors import TrainingFailed, UserError
from fashion_ddp.runs import lock
from fashion_ddp.runs.folder import RunFolder

pytestmark = pytest.mark.quick

# Forked, not spawned: a process in milliseconds, of which some of these tests need a hundred.
forks = multiprocessing.get_context("fork")


class Worker:
    """A real process that holds a folder, and does there what it is told."""

    def __init__(self, folder: Path):
        self.pipe, its = forks.Pipe()
        self.process = forks.Process(target=self._work, args=(folder, its), daemon=True)
        self.process.start()
        its.close()
        assert self.pipe.recv() == "taken"

    def __call__(self, expression: str) -> str:
        """What it gets for an expression; `folder` is its RunFolder."""
        self.pipe.send(expression)
        return self.pipe.recv()

    @staticmethod
    def _work(path: Path, pipe: Any) -> None:
        folder = RunFolder(path, lock=lock.acquire(path))  # noqa: F841 - the expressions know it
        pipe.send("taken")
        while True:
            try:
                pipe.send(str(eval(pipe.recv())))
            except Exception as error:  # noqa: BLE001 - told
                pipe.send(f"{type(error).__name__}: {error}")


@contextlib.contextmanager
def working_in(folder: Path) -> Iterator[Worker]:
    worker = Worker(folder)
    try:
        yield worker
    finally:
        worker.process.kill()
        worker.process.join()


def locks(folder: Path) -> list[Path]:
    return [*folder.glob(".lock*")]


def grow_old(folder: Path, age: float) -> None:
    """Make it that long since the only lock of a folder was touched, by the file system's clock."""
    [path] = locks(folder)
    path.touch()
    touched = path.stat().st_mtime - age
    os.utime(path, (touched, touched))


def leave(folder: Path, age: float = 0.0, content: bytes | None = None, **other: Any) -> Path:
    """A lock file that was last touched `age` seconds ago: with this content, or a real one with `other` entries."""
    path = lock.acquire(folder).path
    path.write_bytes(json.dumps(json.loads(path.read_bytes()) | other).encode() if content is None else content)
    grow_old(folder, age)
    return path


ELSEWHERE: dict[str, Any] = {"machine": "another", "host": "node7", "pid": 1}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pauses between two looks at a folder that seems to be held take no time."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


def test_the_second_is_told_who_holds_it(folder: Path) -> None:
    before = time.strftime("%Y-%m-%d %H:%M:%S")
    with working_in(folder) as first:
        name = lock.holder(folder)
        words, _, since = (name or "").rpartition(" since ")
        assert words == f"process {first.process.pid} on {socket.gethostname()}"
        assert before <= since <= time.strftime("%Y-%m-%d %H:%M:%S")
        with pytest.raises(UserError) as told:
            lock.acquire(folder)
        assert str(told.value) == f"{folder} is in use by {name}: wait for it, or choose another --run-dir"
        assert first("folder.lock.check()") == "None" and len(locks(folder)) == 1
        assert first("folder.lock.release()") == "None" and locks(folder) == []
        assert lock.holder(folder) is None
        taken = lock.acquire(folder)
        assert locks(folder) == [taken.path]
    taken.check()


def test_a_killed_holder_does_not_block(folder: Path) -> None:
    with working_in(folder) as first:
        pid = first.process.pid
        first.process.kill()
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # dead, and still known to the machine
        assert lock.holder(folder) is None
        lock.acquire(folder).release()
    leave(folder, pid=pid)
    assert lock.holder(folder) is None  # nor now that it is not


def test_another_process_of_the_same_number_holds_nothing(folder: Path) -> None:
    path = leave(folder)  # of this very process, which lives
    assert lock.holder(folder) is not None
    path.write_text(json.dumps(json.loads(path.read_text()) | {"born": "1"}))
    assert lock.holder(folder) is None
    assert lock.acquire(folder).path != path and not path.exists()


def test_a_process_that_cannot_be_seen_is_not_taken_for_dead(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on machines whose /proc hides the processes of other users."""
    leave(folder, pid=os.getppid(), born="hidden")
    monkeypatch.setattr(lock, "_start_time", lambda pid: None)
    assert lock.holder(folder) is not None
    for path in locks(folder):
        path.unlink()
    leave(folder, pid=os.getppid(), born=None)
    monkeypatch.undo()
    assert lock.holder(folder) is not None


@pytest.mark.parametrize("clock", [0.0, 1e6, -1e6])
@pytest.mark.parametrize(("age", "holds"), [(0, True), (45, True), (60.5, False), (1e8, False), (-3600, True)])
def test_a_lock_of_another_machine_holds_for_a_minute(
    folder: Path, age: float, holds: bool, clock: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = leave(folder, age, **ELSEWHERE)
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + clock)  # this machine's, which the file system does not know
    assert (lock.holder(folder) is not None) == holds
    assert locks(folder) == [path]


def test_a_touch_keeps_it(folder: Path) -> None:
    with working_in(folder) as first:
        grow_old(folder, 1000)
        assert lock.holder(folder) is None
        assert first("folder.lock.touch()") == "None"
        assert lock.holder(folder) is not None


def test_a_holder_that_stood_still_loses_the_folder_and_changes_nothing(folder: Path) -> None:
    with working_in(folder) as first:
        assert first('folder.write("summary.json", "first")') == first('folder.append("steps.jsonl", [])') == "None"
        os.kill(first.process.pid, signal.SIGSTOP)
        grow_old(folder, 61)
        with working_in(folder) as second:
            assert second('folder.write("summary.json", "second")') == "None"
            before = {path.name: path.read_bytes() for path in folder.iterdir()}
            os.kill(first.process.pid, signal.SIGCONT)
            by = f"TrainingFailed: {folder} was taken by process {second.process.pid} on "
            writes = [
                'write("summary.json", "late")',
                'append("steps.jsonl", [{"step": 1}])',
                'make_folder("checkpoints")',
            ]
            for words in (*writes, 'keep_rows("steps.jsonl", [{"step": 1}])', "lock.check()"):
                told = first(f"folder.{words}")
                assert told.startswith(by) and "while this process stood still" in told
            assert first("folder.lock.touch()") == first("folder.lock.release()") == "None"
            assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
            assert second('folder.write("summary.json", "third")') == "None"
        assert (folder / "summary.json").read_text() == "third"


def test_what_is_taken_during_a_write_stays_as_the_taker_wants_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file server that stands still does so when it is told to keep what was written."""
    run = RunFolder(folder, lock=lock.acquire(folder))
    fsync = os.fsync

    def slow(handle: int) -> None:
        fsync(handle)
        for path in locks(folder):
            path.unlink()
        (folder / "summary.json").write_text("the other's")

    monkeypatch.setattr(os, "fsync", slow)
    with pytest.raises(TrainingFailed, match="was taken away, moved or removed"):
        run.write("summary.json", "ours")
    assert [path.name for path in folder.iterdir()] == ["summary.json"]
    assert (folder / "summary.json").read_text() == "the other's"


def test_a_folder_that_was_moved_is_not_made_again(folder: Path) -> None:
    run = RunFolder(folder, lock=lock.acquire(folder))
    folder.rename(folder.with_name("elsewhere"))
    for again in (False, True):
        with pytest.raises(TrainingFailed, match="was taken away, moved or removed: nothing more is written there"):
            run.write("summary.json", "late")
        assert folder.exists() == again
        folder.mkdir(exist_ok=True)
    assert [*folder.iterdir()] == []


HERE = lock._machine_id()


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"\xff\xfe\x00", b"\x00" * 200, b'{"pid": 1}']
    + [json.dumps({"machine": HERE, "pid": pid, "born": "1"}).encode() for pid in ("x", None, -1, 0, 10**30, [1])],
)
def test_a_lock_that_cannot_be_read_holds_for_a_minute(folder: Path, content: bytes) -> None:
    leave(folder, 45, content)
    with pytest.raises(UserError, match="in use by another process: wait"):
        lock.acquire(folder)
    grow_old(folder, 61)
    assert lock.holder(folder) is None
    taken = lock.acquire(folder)
    assert locks(folder) == [taken.path]


def as_nobody(folder: Path, work: Callable[[], object]) -> str:
    """What becomes of work in a process without rights, which stands in a folder."""
    folder.chmod(0o755)
    here, there = forks.Pipe(duplex=False)

    def run() -> None:
        try:
            os.chdir(folder)
            if os.getuid() == 0:
                os.setgid(65534)
                os.setuid(65534)
            there.send(str(work()))
        except Exception as error:  # noqa: BLE001 - told
            there.send(f"{type(error).__name__}: {error}")

    process = forks.Process(target=run)
    process.start()
    told = here.recv()
    process.join()
    return told


def test_a_folder_that_may_only_be_read(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    for age, said in ((30, "process 1 on node7"), (90, "None")):
        path = leave(folder, age, **ELSEWHERE)
        folder.chmod(0o555)
        assert said in as_nobody(tmp_path, lambda: lock.holder(Path("run")))
        assert as_nobody(tmp_path, lambda: lock.acquire(Path("run"))).startswith("PermissionError: ")
        assert [*folder.iterdir()] == [path]
        folder.chmod(0o755)
        path.unlink()


@pytest.mark.usefixtures("at_once")
def test_a_lock_of_another_user_holds_though_it_may_not_be_read_or_asked_for(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    path = leave(folder)
    folder.chmod(0o777)
    assert f"in use by process {os.getpid()} on" in as_nobody(tmp_path, lambda: lock.acquire(Path("run")))
    path.chmod(0o000)
    assert "in use by another process" in as_nobody(tmp_path, lambda: lock.acquire(Path("run")))
    grow_old(folder, 61)
    assert "Lock(" in as_nobody(tmp_path, lambda: lock.acquire(Path("run")))


def refused(handle: int, how: int) -> None:
    raise OSError(95, "Operation not supported")


@pytest.mark.usefixtures("at_once")
def test_who_stands_still_in_its_turn_does_not_block(folder: Path) -> None:
    folder.mkdir()
    handle = os.open(folder, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    lock.acquire(folder)
    os.close(handle)


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("moment", ["_try_flock", "_write_lock_file", "_read_locks", "_is_alive", "_file_system_time"])
def test_a_folder_that_is_moved_meanwhile_is_not_taken_for_the_one_that_gets_its_name(
    folder: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As --fresh does it, by the one who holds it."""
    first = lock.acquire(folder)
    step = getattr(lock, moment)
    new: list[lock.Lock] = []

    def late(*arguments: Any) -> Any:
        monkeypatch.undo()
        monkeypatch.setattr(time, "sleep", lambda seconds: None)
        folder.rename(folder.with_name("run.1"))
        for path in folder.with_name("run.1").glob(".lock*"):
            path.unlink()
        new.append(lock.acquire(folder))
        return step(*arguments)

    monkeypatch.setattr(lock, moment, late)
    with pytest.raises(UserError, match="in use by process"):
        lock.acquire(folder)
    new[0].check()
    assert locks(folder) == [new[0].path]
    with pytest.raises(TrainingFailed):
        first.check()


@pytest.mark.usefixtures("at_once")
def test_a_folder_that_is_moved_away_meanwhile_is_made_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave_lock = lock._write_lock_file
    (folder / "what was there").mkdir(parents=True)

    def late(mine: lock.Lock) -> None:
        monkeypatch.setattr(lock, "_write_lock_file", leave_lock)
        folder.rename(folder.with_name("run.1"))
        leave_lock(mine)

    monkeypatch.setattr(lock, "_write_lock_file", late)
    taken = lock.acquire(folder)
    assert [*folder.iterdir()] == [taken.path]


def test_two_who_see_each_other_in_a_folder_that_was_moved_do_not_both_go(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.mkdir()
    flock = fcntl.flock
    seen: list[lock.Lock] = []

    def moved(handle: int, how: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        folder.rename(folder.with_name("run.1"))
        seen.append(lock.acquire(folder))
        flock(handle, how)

    monkeypatch.setattr(fcntl, "flock", moved)
    monkeypatch.setattr(time, "sleep", lambda seconds: seconds and seen[0].release())  # it goes, having seen us
    assert locks(folder) == [] and lock.acquire(folder).path.exists()


def test_an_error_leaves_no_lock(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(folder: Path) -> None:
        assert len(locks(folder)) == 1
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(lock, "_read_locks", fails)
    with pytest.raises(OSError, match="Input/output error"):
        lock.acquire(folder)
    assert locks(folder) == []


def dawdle(seed: int) -> None:
    """Before each operation on files, wait a moment or not: what others do then comes in between."""
    rng = random.Random(seed)
    operations = ("open", "os.rename", "os.remove", "os.mkdir", "os.scandir", "fcntl.flock")
    wait = time.sleep
    sys.addaudithook(
        lambda event, args: wait(rng.random() / 500) if event in operations and rng.random() < 0.3 else None
    )


Attempt = Callable[[Path], lock.Lock | None]


def eight(attempt: Attempt, folders: list[Path], apart: bool = False) -> tuple[list[Path], list[str]]:
    """Eight processes make an attempt to get one folder after another, at the same time: the folders that were got, a
    folder once for each who got it, and the errors of the others.

    `apart`: each stands for a machine of its own, with nothing but files between them.
    """
    together, answers = forks.Barrier(8, timeout=60), forks.SimpleQueue()

    def contend(number: int) -> None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - as long as the process
        if apart:
            fcntl.flock = refused
            lock._machine_id = lambda: f"machine {number}"
            pause = time.sleep
            time.sleep = lambda seconds: pause(seconds / 30)
        dawdle(number)
        for folder in folders:
            together.wait()
            try:
                taken = attempt(folder)
                assert taken is not None
                taken.check()
                answers.put(folder)
            except Exception as error:  # noqa: BLE001 - told
                answers.put(f"{type(error).__name__}: {error}")
        together.wait()  # the lock of a process that has ended is anyone's

    workers = [forks.Process(target=contend, args=(n,), daemon=True) for n in range(8)]
    for worker in workers:
        worker.start()
    told = [answers.get() for _ in range(8 * len(folders))]
    for worker in workers:
        worker.join()
    return sorted(one for one in told if isinstance(one, Path)), [one for one in told if isinstance(one, str)]


@pytest.mark.parametrize("apart", [False, True], ids=["one machine", "eight machines"])
@pytest.mark.parametrize("left", ["nothing", "a stale lock"])
def test_of_eight_at_once_one_gets_the_folder(tmp_path: Path, left: str, apart: bool) -> None:
    folders = [tmp_path / f"{n:02}" for n in range(24 if left == "a stale lock" and not apart else 6)]
    for folder in folders:
        if left == "a stale lock":
            leave(folder, 61, **ELSEWHERE)
    got, errors = eight(lock.acquire, folders, apart)
    # Between machines chance decides, and now and then nobody gets it.
    assert got == folders if not apart else len(got) > len(folders) / 2 and set(got) <= set(folders)
    assert len(set(got)) == len(got) and [error for error in errors if " is in use by " not in error] == []
    assert all(len(locks(folder)) == (folder in got) for folder in folders)
