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


# The files that rank 0 renames, each with the occasions that differ: an epoch's end, its row, the end.
RENAMES = [(name, 1) for name in (".lock.*", "config.yaml", "environment.json", "model.txt", ".rank0", "summary.json")]
# The third checkpoint is the first that removes an older one.
RENAMES += [(f"step-{step:09}.pt", 1) for step in (1, 2, 3, TINY_STEPS, ALL_STEPS)] + [("summary.json", 3)]
RENAMES += [(f"{name}.safetensors", 1) for name in ("predictions", "examples", "model")] + [("summary.json", 6)]
KILLS = [Fault(point, "kill", rank) for point in ("parse", "rendezvous", "met", "load", "claim") for rank in (0, 1)]
MIDDLE = {"step": 11, "forward": 13, "sync point": TINY_STEPS, "after the sync point": 5}  # two forward passes warm up
MIDDLE |= {"evaluation": 2, "evaluated": 3}
KILLS += [Fault(point, "kill", rank, count) for point, count in MIDDLE.items() for rank in (0, 1)]
ON_RANK_0 = {"step": [1], "save": [1], "saved": [9], "fsync": [1, 12, 13], "append": [1, TINY_STEPS + 1]}
ON_RANK_0 |= {"results": [1], "end": [1]}  # the second append is of metrics.jsonl
KILLS += [Fault(point, "kill", 0, count) for point, counts in ON_RANK_0.items() for count in counts]
KILLS += [Fault(f"{at} a rename of {name}", "kill", 0, n) for name, n in RENAMES for at in ("before", "after")]
LAST = Fault("after a rename of summary.json", "kill", 0, 6)
FEW = [Fault("met", "kill", 0), Fault("forward", "kill", 1, 13)]
FEW += [Fault("before a rename of step-000000003.pt", "kill", 0, 1)]
TIERS = [pytest.param(fault, marks=[] if fault in FEW else pytest.mark.slow) for fault in KILLS]


@pytest.mark.parametrize("fault", TIERS, ids=str)
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


def test_a_checkpoint_that_does_not_fit_is_tried_again(disk: Disk, tmp_path: Path, uninterrupted: Path) -> None:
    faults = [Fault("save", "fill", 0, 5), Fault("save", "make room", 0, 7)]
    run = start_tiny(2, tmp_path, [], faults, disk=disk)
    assert run.wait() == [0, 0]
    assert len(run.errors()) == 2 and all("No space left on device" in line for line in run.errors())
    assert run.errors()[0].startswith("warning: no checkpoint at step 5, to be tried again: run/checkpoints/step-0000")
    assert wrong(disk.seen, uninterrupted) == []


FULL = "fill to the last byte"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (Fault("append", FULL), "run/steps.jsonl cannot be written (No space left on device)"),
        (Fault("evaluation", FULL, 0, 1), "run/metrics.jsonl cannot be written (No space left on device)"),
        (Fault("evaluation", FULL, 0, 2), "run/summary.json cannot be written (No space left on device)"),
        (Fault("save", "fill"), "run/checkpoints/step-000000150.pt cannot be written (No space left on device)"),
        (Fault("results", FULL), "run/predictions.safetensors cannot be written (No space left on device)"),
        (Fault("step", "make read-only", 0, 10), "cannot be written (Read-only file system)"),
        (Fault("results", "make read-only"), "cannot be written (Read-only file system)"),
    ],
    ids=str,
)
def test_a_run_that_can_write_no_more_fails_with_one_message_and_continues_when_that_is_mended(
    fault: Fault, said: str, disk: Disk, tmp_path: Path
) -> None:
    words = ["--batch-size", "40", "--checkpoint-every", "1000"]  # an epoch's steps.jsonl is more than a page
    (tmp_path / "whole").mkdir()
    assert start_tiny(2, tmp_path / "whole", words).wait() == [0, 0]
    run = start_tiny(2, tmp_path, words, [fault], disk=disk)
    assert run.wait() == [1, 1]
    assert run.noted("struck") == [str(fault)]
    [error] = run.errors()
    assert f"{said}: mend that, and give the same command again" in error
    if fault.action == "fill":  # there is room to say so
        assert summary(disk.seen)["status"] == "failed" and said in summary(disk.seen)["error"]
    if fault.action == "make read-only":
        disk.remount("rw")
    else:
        (disk.seen / "run" / "ballast").unlink()
    assert start_tiny(2, tmp_path, words, disk=disk).wait() == [0, 0]
    assert wrong(disk.seen, tmp_path / "whole") == []


RAISED = [Fault("step", "raise", 0, 11), Fault("step", "raise", 2, 11), Fault("evaluation", "raise", 0, 1)]
RAISED += [Fault("evaluated", "raise", 1, 3), Fault("save", "raise", 0, 3), Fault("results", "raise", 0, 1)]
RAISED_SLOW = [pytest.param(fault, marks=pytest.mark.slow) for fault in RAISED]


@pytest.mark.parametrize("fault", [Fault("step", "raise", 1, 11), *RAISED_SLOW], ids=str)
def test_an_error_on_one_rank_is_told_once_and_ends_all(fault: Fault, tmp_path: Path, uninterrupted: Path) -> None:
    ranks = max(2, fault.rank + 1)
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


def test_a_run_struck_by_faults_that_are_drawn_ends_as_if_nothing_had(tmp_path: Path) -> None:
    soaked = soak.Soak(tmp_path).run(seed=9, faults=4)
    assert not soaked.failures, "\n".join([*soaked.failures, *soaked.history])


@pytest.mark.slow
def test_faults_drawn_by_seed_leave_no_trace_in_results(tmp_path: Path) -> None:
    said: list[str] = []
    runs = soak.soak(25, 2, tmp_path, said.append)
    assert not any(run.failures for run in runs), "\n".join(said)
    figures = soak.totals(runs)
    assert figures["faults"] >= 25 and figures["steps_committed"] == len(runs) * ALL_STEPS
