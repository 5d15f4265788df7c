"""A rank that hangs, or stands still, ends the run in bounded time, and is named; slowness alone does not."""

import json
import os
import signal
import time
from pathlib import Path

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


def behind(fault: Fault) -> str:
    """Who is waited for: the rank that a fault struck."""
    return f"all wait for rank {fault.rank} on {HOST}" + (" (which does not answer)" * (fault.action == "stand still"))


FORWARD = Fault("forward", "hang", 1, 13)
FAULTS = [Fault("sync point", "hang", 0, 5), Fault("save", "hang", 0, 3), Fault("evaluation", "hang", 1, 2)]
FAULTS += [Fault("results", "hang", 0), Fault("step", "hang", 2, 5), Fault("all-reduce", "hang", 1, 10)]
FAULTS += [Fault("step", "stand still", 1, 5), Fault("step", "stand still", 0, 5)]


@pytest.mark.parametrize("fault", [FORWARD, *[pytest.param(one, marks=pytest.mark.slow) for one in FAULTS]], ids=str)
def test_a_rank_that_does_not_come_is_named_and_ends_the_run(fault: Fault, tmp_path: Path, uninterrupted: Path) -> None:
    size, still = max(2, fault.rank + 1), fault.action == "stand still"
    run = start_tiny(size, tmp_path, WORDS, [fault])
    assert run.wait(patience=3) == [-signal.SIGKILL if still and rank == fault.rank else 1 for rank in range(size)]
    within = "no rank is behind the others, so all wait within one operation"
    message = f"nothing happened for {TIMEOUT} s (--timeout): " + (
        within if fault.point == "all-reduce" else behind(fault)
    )
    assert run.errors() == [f"error: {message}; stacks are in run/logs; {CONTINUES}"]
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


END, ALONE, FAILED = (Fault("end", "hang"), Fault("step", "hang", 0, 10), Fault("step", "raise", 1, 10))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("faults", "codes", "said"),
    [
        ([END], [1, 0], behind(END)),  # the others have ended
        ([ALONE], [1], behind(ALONE)),
        ([ALONE, FAILED], [1, 1], f"all wait for rank 1 on {HOST} (which does not answer)"),
    ],
    ids=str,
)
def test_a_rank_that_hangs_where_no_other_waits_is_named(
    faults: list[Fault], codes: list[int], said: str, tmp_path: Path
) -> None:
    run = start_tiny(len(codes), tmp_path, WORDS, faults)
    assert run.wait() == codes
    [error] = [line for line in run.errors() if line.startswith("error: nothing happened")]
    assert f"(--timeout): {said};" in error and "in _hang" in log(tmp_path, 0)
    assert start_tiny(len(codes), tmp_path, WORDS).wait() == [0] * len(codes)


@pytest.mark.slow
def test_a_file_system_that_hangs_does_not_hold_the_ranks_for_ever(tmp_path: Path, uninterrupted: Path) -> None:
    run = start_tiny(2, tmp_path, WORDS, [Fault("step", "wait", 0, 10)])
    eventually(lambda: run.noted("struck"))
    hanging = [tmp_path / "run" / "logs" / name for name in ("rank0.log", "rank1.log", ".rank0.new", ".rank1.new")]
    for path in hanging:
        path.unlink(missing_ok=True)
        os.mkfifo(path)  # whose opening waits for a reader who never comes
    assert run.wait() == [1, 1]
    said = f"error: nothing happened for {TIMEOUT} s (--timeout), and run/logs does not answer; {CONTINUES}"
    assert run.errors() == [said]
    for path in hanging:
        path.unlink(missing_ok=True)
    assert start_tiny(2, tmp_path, WORDS).wait() == [0, 0]
    assert wrong(tmp_path, uninterrupted) == []


@pytest.mark.slow
@pytest.mark.parametrize("how", ["stood still", "slow machine"])
def test_a_run_that_is_only_slow_goes_on(how: str, tmp_path: Path, uninterrupted: Path) -> None:
    run = start_tiny(2, tmp_path, WORDS, [Fault("step", "wait", 0, 10)] * (how == "stood still"))
    eventually(lambda: run.noted("struck") if how == "stood still" else run.noted("steps"))
    # Longer than the time-out, after a few signs of life, all from the same place; or again and again.
    awake, asleep = (TIMEOUT / 3, 2 * TIMEOUT) if how == "stood still" else (0.1, 0.4)
    while any(process.is_alive() for process in run.processes):
        time.sleep(awake)
        run.send(signal.SIGSTOP)
        time.sleep(asleep)
        run.send(signal.SIGCONT)
        (tmp_path / "go").touch()
    assert run.wait() == [0, 0]
    assert run.errors() == [] and log(tmp_path, 0) == log(tmp_path, 1) == ""
    assert wrong(tmp_path, uninterrupted) == []


def _watched(folder: Path, what: str) -> str:
    """The log of a rank that arrives nowhere for longer than the time-out; but it took leave of the others, or goes
    on while the watch is about to give up."""
    cfg = Config(device="cpu", threads=1, timeout=0.5)
    if what == "goes on":
        go_on = between_ranks.entering_collective
        wrap("fashion_ddp.training.watchdog", "Watchdog._dump", lambda dump, *args: (dump(*args), go_on()))
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
