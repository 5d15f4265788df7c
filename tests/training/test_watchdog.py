"""A rank that hangs, or stands still, ends the run in bounded time, and is named; slowness alone does not."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import ranks
from faults import Fault, eventually, start_tiny, wrap, wrong

from fashion_ddp.config import Config
from fashion_ddp.distributed import world as between_ranks
from fashion_ddp.distributed.world import open_world
from fashion_ddp.runs.folder import RunFolder
from fashion_ddp.runs.lock import acquire
from fashion_ddp.runs.reading import load_run
from fashion_ddp.training.watchdog import Watchdog

HOST = os.uname().nodename
TIMEOUT = 3
WORDS = ["--timeout", str(TIMEOUT)]
CONTINUES = "the same command continues from the last checkpoint"


def log(folder: Path, rank: int) -> str:
    return (folder / "run" / "logs" / f"rank{rank}.log").read_text()


def _slow(*values: Any) -> Any:
    return pytest.param(*values, id=f"{values[0]}, {values[1]} ranks", marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("fault", "size"),
    [
        pytest.param(Fault("forward", "hang", 1, 13), 2, id="forward"),
        _slow(Fault("sync point", "hang", 0, 5), 2),
        _slow(Fault("save", "hang", 0, 3), 2),
        _slow(Fault("evaluation", "hang", 1, 2), 2),
        _slow(Fault("results", "hang", 0, 1), 2),
        _slow(Fault("step", "hang", 1, 5), 3),
        _slow(Fault("step", "stand still", 1, 5), 2),
        _slow(Fault("step", "stand still", 0, 5), 2),
    ],
)
def test_a_rank_that_does_not_come_is_named_and_ends_the_run(
    fault: Fault, size: int, tmp_path: Path, uninterrupted: Path
) -> None:
    still = fault.action == "stand still"
    run = start_tiny(size, tmp_path, WORDS, [fault])
    assert run.wait(patience=3) == [-signal.SIGKILL if still and rank == fault.rank else 1 for rank in range(size)]
    name = f"rank {fault.rank} on {HOST}" + (" (which does not answer)" if still else "")
    message = f"nothing happened for {TIMEOUT} s (--timeout): all wait for {name}"
    where = f"stacks are in run/logs; {CONTINUES}"
    assert run.errors() == [f"error: {message}; {where}"]
    for rank in range(size):
        if not (still and rank == fault.rank):
            assert message in log(tmp_path, rank) and "(most recent call first)" in log(tmp_path, rank)
    assert still or "in _hang" in log(tmp_path, fault.rank)
    record = load_run(tmp_path / "run").summary
    if still and fault.rank == 0:
        assert record["status"] == "interrupted"  # nobody else may write it
    else:
        assert (record["status"], record["error"]) == ("failed", message)
    assert start_tiny(size, tmp_path, WORDS).wait() == [0] * size
    assert size != 2 or wrong(tmp_path, uninterrupted) == []


@pytest.mark.slow
def test_a_rank_that_hangs_when_the_others_have_ended_is_named(tmp_path: Path, uninterrupted: Path) -> None:
    run = start_tiny(2, tmp_path, WORDS, [Fault("end", "hang", 0, 1)])
    assert run.wait() == [1, 0]
    [error] = run.errors()
    assert f"(--timeout): all wait for rank 0 on {HOST};" in error and "in _hang" in log(tmp_path, 0)
    assert start_tiny(2, tmp_path, WORDS).wait() == [0, 0]
    assert wrong(tmp_path, uninterrupted) == []


@pytest.mark.slow
def test_a_rank_that_failed_is_named_where_the_others_do_not_notice(tmp_path: Path) -> None:
    run = start_tiny(2, tmp_path, WORDS, [Fault("step", "hang", 0, 10), Fault("step", "raise", 1, 10)])
    assert run.wait() == [1, 1]
    told = [line for line in run.errors() if line.startswith("error: nothing happened")]
    assert len(told) == 1 and f"all wait for rank 1 on {HOST} (which does not answer);" in told[0]


@pytest.mark.slow
def test_ranks_that_hang_within_one_operation_leave_their_stacks(tmp_path: Path) -> None:
    run = start_tiny(2, tmp_path, WORDS, [Fault("all-reduce", "hang", 1, 10)])
    assert run.wait() == [1, 1]
    [error] = run.errors()
    assert "no rank is behind the others, so all wait within one operation; stacks are in run/logs" in error
    assert "in _hang" in log(tmp_path, 1) and "in all_reduce" in log(tmp_path, 0)


@pytest.mark.slow
def test_a_run_of_one_rank_is_watched_too(tmp_path: Path) -> None:
    run = start_tiny(1, tmp_path, WORDS, [Fault("step", "hang", 0, 10)])
    assert run.wait() == [1]
    [error] = run.errors()
    assert f"all wait for rank 0 on {HOST};" in error and "in _hang" in log(tmp_path, 0)
    assert start_tiny(1, tmp_path, WORDS).wait() == [0]


@pytest.mark.slow
def test_a_file_system_that_hangs_does_not_hold_the_ranks_for_ever(tmp_path: Path, uninterrupted: Path) -> None:
    run = start_tiny(2, tmp_path, WORDS, [Fault("step", "wait", 0, 10)])
    eventually(lambda: run.noted("struck"))
    logs = tmp_path / "run" / "logs"
    hanging = ("rank0.log", "rank1.log", ".rank0.new", ".rank1.new")
    for name in hanging:
        (logs / name).unlink(missing_ok=True)
        os.mkfifo(logs / name)  # whose opening waits for a reader who never comes
    assert run.wait() == [1, 1]
    assert run.errors() == [
        f"error: nothing happened for {TIMEOUT} s (--timeout), and run/logs does not answer; {CONTINUES}"
    ]
    for name in hanging:
        (logs / name).unlink(missing_ok=True)
    assert start_tiny(2, tmp_path, WORDS).wait() == [0, 0]
    assert wrong(tmp_path, uninterrupted) == []


# --- No false alarm ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_that_stood_still_longer_than_the_timeout_goes_on(tmp_path: Path, uninterrupted: Path) -> None:
    run = start_tiny(2, tmp_path, WORDS, [Fault("step", "wait", 0, 10)])
    eventually(lambda: run.noted("struck"))
    time.sleep(TIMEOUT / 3)  # a few signs of life, all from the same place
    run.send(signal.SIGSTOP)
    time.sleep(2 * TIMEOUT)
    run.send(signal.SIGCONT)
    (tmp_path / "go").touch()
    assert run.wait() == [0, 0]
    assert run.errors() == [] and log(tmp_path, 0) == log(tmp_path, 1) == ""
    assert wrong(tmp_path, uninterrupted) == []


@pytest.mark.slow
def test_a_slow_machine_raises_no_alarm(tmp_path: Path, uninterrupted: Path) -> None:
    run = start_tiny(2, tmp_path, WORDS)
    eventually(lambda: run.noted("steps"))
    while any(process.is_alive() for process in run.processes):
        run.send(signal.SIGSTOP)
        time.sleep(0.4)
        run.send(signal.SIGCONT)
        time.sleep(0.1)
    assert run.wait() == [0, 0]
    assert run.errors() == [] and log(tmp_path, 0) == log(tmp_path, 1) == ""
    assert wrong(tmp_path, uninterrupted) == []


def _watched(folder: Path, what: str) -> str:
    """The log of a rank that arrives nowhere for longer than the time-out; but it took leave of the others, or goes
    on while the watch is about to give up."""
    cfg = Config(device="cpu", threads=1, timeout=0.5)
    if what == "goes on":
        wrap(
            "fashion_ddp.training.watchdog",
            "Watchdog._dump",
            lambda function, *args: (function(*args), between_ranks.entering_collective()),
        )
    with open_world(cfg) as world, Watchdog(world, RunFolder(folder), cfg.timeout):
        if what == "took leave":
            world.leave()
        time.sleep(1.5)
    return (folder / "logs" / "rank0.log").read_text()


@pytest.mark.slow
def test_who_took_leave_may_take_its_time(tmp_path: Path) -> None:
    assert ranks(1, _watched, tmp_path, "took leave") == [""]


@pytest.mark.slow
def test_a_rank_that_goes_on_at_the_last_moment_is_not_ended(tmp_path: Path) -> None:
    [said] = ranks(1, _watched, tmp_path, "goes on")
    assert said.count("nothing happened for 0.5 s; where this rank is:") == said.count("it went on") >= 1


# --- Its traces ----------------------------------------------------------------------------------------------------


def _leaves(folder: Path) -> list[str]:
    lock = acquire(folder)
    cfg = Config(device="cpu", threads=1)
    with open_world(cfg) as world, Watchdog(world, RunFolder(folder, lock=lock), 60):
        sign = json.loads((folder / "logs" / ".rank0").read_text())
        assert sign == {"entered": between_ranks.collectives_entered(), "host": HOST}
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_signs_of_life_are_swept_away_with_those_of_earlier_starts(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    for name in (".rank7", ".rank7.new", ".told"):
        (tmp_path / "logs" / name).touch()
    assert ranks(1, _leaves, tmp_path) == [["logs/rank0.log"]]
