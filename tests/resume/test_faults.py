"""Faults that strike real runs: whatever ends a run, the same command brings it to the result of one that nothing
ended."""

import json
import os
import re
import signal
import time
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import soak
from faults import TINY_STEPS, Disk, Fault, Ranks, eventually, start_tiny, summary, wrong

ALL_STEPS = 3 * TINY_STEPS
HOST = os.uname().nodename


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    with Disk(tmp_path) as disk:
        yield disk


def checkpoints(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "run" / "checkpoints").glob("step-*"))}


# --- Killed ------------------------------------------------------------------------------------------------------

# The files that rank 0 renames, each with the occasions that differ.
RENAMES = [
    (".lock.*", 1),
    ("config.yaml", 1),
    ("environment.json", 1),
    ("model.txt", 1),
    (".rank0", 1),
    ("summary.json", 1),  # at the start
    ("step-000000001.pt", 1),
    ("step-000000002.pt", 1),
    ("step-000000003.pt", 1),  # the first that removes an older one
    (f"step-{TINY_STEPS:09}.pt", 1),  # at an epoch's end
    ("summary.json", 3),  # of an epoch
    (f"step-{ALL_STEPS:09}.pt", 1),  # the last
    ("predictions.safetensors", 1),
    ("examples.safetensors", 1),
    ("model.safetensors", 1),
    ("summary.json", 6),  # finished
]
AT_RENAMES = [
    Fault(f"{when} a rename of {name}", "kill", 0, count) for name, count in RENAMES for when in ("before", "after")
]
ANYWHERE = [
    Fault(point, "kill", rank, count)
    for point, count in {
        "parse": 1,
        "rendezvous": 1,
        "met": 1,
        "load": 1,
        "claim": 1,
        "step": 11,
        "forward": 13,  # two of them warm up
        "sync point": TINY_STEPS,
        "after the sync point": 5,
        "evaluation": 2,
        "evaluated": 3,
    }.items()
    for rank in (0, 1)
]
ON_RANK_0 = [
    Fault("step", "kill", 0, 1),
    Fault("save", "kill", 0, 1),
    Fault("saved", "kill", 0, 9),
    Fault("fsync", "kill", 0, 1),
    Fault("fsync", "kill", 0, 12),
    Fault("fsync", "kill", 0, 13),
    Fault("append", "kill", 0, 1),
    Fault("append", "kill", 0, TINY_STEPS + 1),  # of metrics.jsonl
    Fault("results", "kill", 0, 1),
    Fault("end", "kill", 0, 1),
]
LAST = Fault("after a rename of summary.json", "kill", 0, 6)
FEW = [Fault("met", "kill", 0), Fault("forward", "kill", 1, 13)]
FEW += [Fault("before a rename of step-000000003.pt", "kill", 0, 1)]


def _tier(fault: Fault) -> Any:
    return pytest.param(fault, id=str(fault), marks=[] if fault in FEW else pytest.mark.slow)


@pytest.mark.parametrize("fault", [_tier(fault) for fault in [*ANYWHERE, *ON_RANK_0, *AT_RENAMES]])
def test_a_killed_run_continues_to_the_result_of_one_that_was_not(
    fault: Fault, tmp_path: Path, uninterrupted: Path
) -> None:
    run = start_tiny(2, tmp_path, [], [fault])
    assert run.wait(patience=1)[fault.rank] == -signal.SIGKILL
    assert run.noted("struck") == [str(fault)]
    assert not [line for line in run.errors() if line.startswith("Traceback")]
    assert start_tiny(2, tmp_path).wait() == [0, 0]
    if fault == LAST:  # the folder of a finished run is left as it is, with what tells that a process was there
        for trace in [*(tmp_path / "run").glob(".lock.*"), *(tmp_path / "run" / "logs").glob(".rank*")]:
            trace.unlink()
    assert wrong(tmp_path, uninterrupted) == []
    again = len(run.noted("steps")) - ALL_STEPS
    assert again <= (fault.point not in ("step", "forward"))  # there, all that was done had been saved


def test_every_file_that_a_run_renames_is_among_those_tried(uninterrupted: Path) -> None:
    renamed = Ranks(uninterrupted, []).noted("renames")
    named = {name for name, _ in RENAMES} | {"step-*.pt"}
    assert [name for name in renamed if not any(fnmatch(name, pattern) for pattern in named)] == []
    assert [pattern for pattern in named if not any(fnmatch(name, pattern) for name in renamed)] == []
    assert renamed.count("summary.json") == 6 and renamed[-1] == "summary.json"


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("name", "first"), [("steps.jsonl", 5), ("metrics.jsonl", TINY_STEPS + 1)])
def test_a_run_killed_while_it_mends_its_records_continues(
    name: str, first: int, when: str, tmp_path: Path, uninterrupted: Path
) -> None:
    faults = [Fault("append", "kill", 0, first), Fault(f"{when} a rename of {name}", "kill", 0, 1)]
    for fault in faults:
        run = start_tiny(2, tmp_path, [], [fault])
        assert run.wait()[0] == -signal.SIGKILL
    assert run.noted("struck") == [str(fault) for fault in faults]
    assert start_tiny(2, tmp_path).wait() == [0, 0]
    assert wrong(tmp_path, uninterrupted) == []


@pytest.mark.slow
def test_a_run_killed_at_every_second_step_ends_all_the_same(tmp_path: Path, uninterrupted: Path) -> None:
    for start_ in range(ALL_STEPS // 2 - 1):
        run = start_tiny(2, tmp_path, [], [Fault("step", "kill", rank=start_ % 2, count=3)])
        assert run.wait()[start_ % 2] == -signal.SIGKILL
    assert start_tiny(2, tmp_path).wait() == [0, 0]
    assert wrong(tmp_path, uninterrupted) == []
    assert summary(tmp_path)["starts"] == ALL_STEPS // 2


# --- A disk that is full, or cannot be written ---------------------------------------------------------------------


def test_a_checkpoint_that_does_not_fit_is_tried_again(disk: Disk, tmp_path: Path, uninterrupted: Path) -> None:
    faults = [Fault("save", "fill", 0, 5), Fault("save", "make room", 0, 7)]
    run = start_tiny(2, tmp_path, [], faults, disk=disk)
    assert run.wait() == [0, 0]
    assert len(run.errors()) == 2 and all("No space left on device" in line for line in run.errors())
    assert run.errors()[0].startswith("warning: no checkpoint at step 5, to be tried again: run/checkpoints/step-0000")
    assert wrong(disk.seen, uninterrupted) == []


@pytest.mark.slow
def test_a_run_whose_last_checkpoint_does_not_fit_fails_and_continues_when_there_is_room(
    disk: Disk, tmp_path: Path, uninterrupted: Path
) -> None:
    words = ["--checkpoint-every", "1000"]
    stopped = start_tiny(2, tmp_path, words, [Fault("step", "TERM", 0, 10)], disk=disk)
    assert stopped.wait() == [75, 75]
    before = checkpoints(disk.seen)
    assert list(before) == ["step-000000010.pt"]
    run = start_tiny(2, tmp_path, words, [Fault("step", "fill", 0, 1)], disk=disk)
    assert run.wait() == [1, 1]
    [error] = run.errors()
    assert error.startswith(
        f"error: {HOST}: run/checkpoints/step-000000024.pt cannot be written (No space left on device)"
    )
    assert "the same command" in error
    assert summary(disk.seen)["status"] == "failed" and "No space left" in summary(disk.seen)["error"]
    assert checkpoints(disk.seen) == before
    (disk.seen / "run" / "ballast").unlink()
    assert start_tiny(2, tmp_path, words, disk=disk).wait() == [0, 0]
    assert wrong(disk.seen, uninterrupted) == []
    assert len(run.noted("steps")) == 10 + 2 * 14


@pytest.mark.slow
@pytest.mark.parametrize(
    ("point", "count", "file"),
    [
        ("append", 1, "steps.jsonl"),
        ("evaluation", 1, "metrics.jsonl"),
        ("evaluation", 2, "summary.json"),
        ("results", 1, "predictions.safetensors"),
    ],
)
def test_a_run_whose_disk_is_full_fails_with_one_message_and_continues_when_there_is_room(
    point: str, count: int, file: str, disk: Disk, tmp_path: Path
) -> None:
    words = ["--batch-size", "40", "--checkpoint-every", "1000"]  # an epoch's steps.jsonl is more than a page
    (tmp_path / "whole").mkdir()
    assert start_tiny(2, tmp_path / "whole", words).wait() == [0, 0]
    run = start_tiny(2, tmp_path, words, [Fault(point, "fill to the last byte", 0, count)], disk=disk)
    assert run.wait() == [1, 1]
    [error] = run.errors()
    assert f"run/{file} cannot be written (No space left on device): mend that" in error
    (disk.seen / "run" / "ballast").unlink()
    assert start_tiny(2, tmp_path, words, disk=disk).wait() == [0, 0]
    assert wrong(disk.seen, tmp_path / "whole") == []


@pytest.mark.slow
def test_a_folder_that_is_read_only_at_the_start_is_refused_at_once(
    disk: Disk, tmp_path: Path, uninterrupted: Path
) -> None:
    disk.remount("ro")
    run = start_tiny(2, tmp_path, disk=disk)
    assert run.wait() == [2, 2]
    assert run.errors() == [f"error: {HOST}: run: cannot be written (Read-only file system): choose another --runs-dir"]
    assert not run.noted("steps")
    disk.remount("rw")
    stopped = start_tiny(2, tmp_path, [], [Fault("step", "TERM", 1, 10)], disk=disk)
    assert stopped.wait() == [75, 75]
    disk.remount("ro")
    again = start_tiny(2, tmp_path, disk=disk)
    assert again.wait() == [2, 2] and len(again.errors()) == 2
    disk.remount("rw")
    assert start_tiny(2, tmp_path, disk=disk).wait() == [0, 0]
    assert wrong(disk.seen, uninterrupted) == []


@pytest.mark.slow
@pytest.mark.parametrize("fault", [Fault("step", "make read-only", 0, 10), Fault("results", "make read-only", 0, 1)])
def test_a_folder_that_becomes_read_only_ends_the_run_which_continues_when_it_is_mended(
    fault: Fault, disk: Disk, tmp_path: Path, uninterrupted: Path
) -> None:
    run = start_tiny(2, tmp_path, [], [fault], disk=disk)
    assert run.wait() == [1, 1]
    assert run.noted("struck") == [str(fault)]
    [error] = run.errors()
    assert "cannot be written (Read-only file system): mend that, and give the same command again" in error
    disk.remount("rw")
    assert start_tiny(2, tmp_path, disk=disk).wait() == [0, 0]
    assert wrong(disk.seen, uninterrupted) == []


# --- An error on one rank ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "ranks"),
    [
        (Fault("step", "raise", 1, 11), 2),
        pytest.param(Fault("step", "raise", 0, 11), 2, marks=pytest.mark.slow),
        pytest.param(Fault("step", "raise", 2, 11), 3, marks=pytest.mark.slow),
        pytest.param(Fault("evaluation", "raise", 0, 1), 2, marks=pytest.mark.slow),
        pytest.param(Fault("evaluated", "raise", 1, 3), 2, marks=pytest.mark.slow),
        pytest.param(Fault("save", "raise", 0, 3), 2, marks=pytest.mark.slow),
        pytest.param(Fault("results", "raise", 0, 1), 2, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_an_error_on_one_rank_is_told_once_and_ends_all(
    fault: Fault, ranks: int, tmp_path: Path, uninterrupted: Path
) -> None:
    run = start_tiny(ranks, tmp_path, [], [fault])
    assert run.wait() == [1] * ranks
    assert run.printed().count("RuntimeError: an injected error") == 1
    assert run.printed().count("Traceback") == 1
    assert run.errors()[1:] == [] or run.errors()[:1][0].startswith("error: another rank ended before its time")
    log = (tmp_path / "run" / "logs" / f"rank{fault.rank}.log").read_text()
    assert log.count("RuntimeError: an injected error") == 1 and "in _raise" in log
    assert summary(tmp_path)["status"] == "failed"
    assert ("an injected error" if fault.rank == 0 else "another rank ended") in summary(tmp_path)["error"]
    assert start_tiny(2, tmp_path).wait() == [0, 0]
    if ranks == 2:
        assert wrong(tmp_path, uninterrupted) == []


@pytest.mark.parametrize("every_step", [True, False])
def test_a_loss_that_is_not_finite_ends_all_ranks_with_the_step_named(every_step: bool, tmp_path: Path) -> None:
    words = ["--model", "linear", "--lr", "1e9", "--optimizer", "sgd", "--precision", "fp64"]
    run = start_tiny(2, tmp_path, words, [], every_step)
    assert run.wait() == [1, 1]
    [error] = run.errors()
    told = re.match(r"error: the loss is (?:nan|inf) at step (\d+), where lr is 1e\+09: .*--lr", error)
    assert told and "Traceback" not in run.printed()
    step = int(told[1])
    assert 1 < step <= ALL_STEPS
    assert summary(tmp_path)["status"] == "failed" and summary(tmp_path)["error"] in error
    assert all(name < f"step-{step:09}.pt" for name in checkpoints(tmp_path))
    rows = [json.loads(line) for line in (tmp_path / "run" / "steps.jsonl").read_text().splitlines()]
    assert all(row["step"] < step for row in rows)


# --- Two commands on one folder ------------------------------------------------------------------------------------


def test_a_second_command_on_a_run_folder_is_told_who_holds_it(tmp_path: Path, uninterrupted: Path) -> None:
    first = start_tiny(2, tmp_path, [], [Fault("step", "wait", 0, 10)])
    eventually(lambda: first.noted("struck"))
    held = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    second = start_tiny(1, tmp_path)
    assert second.wait() == [2]
    [error] = second.errors()
    assert error.startswith(f"error: run is in use by process {first.processes[0].pid} on {HOST} since")
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == held
    (tmp_path / "go").touch()
    assert first.wait() == [0, 0]
    assert wrong(tmp_path, uninterrupted) == []
    assert summary(tmp_path)["starts"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("at_work", [True, False])
def test_a_command_that_stood_still_too_long_leaves_the_folder_to_another(
    at_work: bool, tmp_path: Path, uninterrupted: Path
) -> None:
    first = start_tiny(2, tmp_path, [], [Fault("step", "stand still", 0, 10)])
    eventually(lambda: first.noted("struck"))
    [lock] = (tmp_path / "run").glob(".lock.*")
    os.utime(lock, (time.time() - 61, time.time() - 61))
    second = start_tiny(2, tmp_path, [], [Fault("step", "wait", 0, 4)] if at_work else [])
    if at_work:
        eventually(lambda: len(second.noted("struck")) == 2)
    else:
        assert second.wait() == [0, 0]
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file() and p.parent.name != "logs"}
    first.send(signal.SIGCONT)
    assert first.wait() == [1, 1]
    after = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file() and p.parent.name != "logs"}
    assert after == before
    [error] = first.errors()
    who = f"was taken by process {second.processes[0].pid}" if at_work else "was taken away, moved or removed"
    assert error.startswith(f"error: run {who}") and "nothing more is written" in error
    (tmp_path / "go").touch()
    assert second.wait() == [0, 0]
    assert wrong(tmp_path, uninterrupted) == []
    assert summary(tmp_path)["starts"] == 2


# --- Drawn by seed -------------------------------------------------------------------------------------------------

REPLAYED: list[int] = []  # every seed of a run that `soak.py` ever found wrong


@pytest.mark.parametrize(
    ("seed", "faults"),
    [(9, 4), *(pytest.param(seed, soak.STRUCK, marks=pytest.mark.slow) for seed in REPLAYED)],
)
def test_a_run_struck_by_faults_that_are_drawn_ends_as_if_nothing_had(seed: int, faults: int, tmp_path: Path) -> None:
    soaked = soak.Soak(tmp_path).run(seed, faults)
    assert not soaked.failures, "\n".join([*soaked.failures, *soaked.history])


@pytest.mark.slow
def test_faults_drawn_by_seed_leave_no_trace_in_results(tmp_path: Path) -> None:
    said: list[str] = []
    runs = soak.soak(25, 2, None, tmp_path, said.append)
    assert not any(run.failures for run in runs), "\n".join(said)
    figures = soak.totals(runs)
    assert figures["faults"] >= 25 and figures["steps_committed"] == len(runs) * ALL_STEPS
