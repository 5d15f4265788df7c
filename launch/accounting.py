"""Gather what submitted runs cost, from SLURM's accounting and from their own starts, for the report.

The comparison's job calls `write_costs`. What it writes into each run's folder, as cost.json, is all that the report
needs, on any machine. Without accounting it is what the runs recorded themselves.
"""

import datetime
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fashion_ddp.console import say
from fashion_ddp.errors import UserError
from fashion_ddp.files import write_whole
from fashion_ddp.runs.reading import COST_FILE, Run, load_run
from launch import jobs, slurm
from launch.starts import TIME_FORMAT, Starts

PATIENCE = 20.0  # seconds that the accounting gets to learn of the jobs' last moments: it is told of them after the end
PAUSE = 2.0
DAY, HOUR = 86400, 3600  # seconds
COLUMNS = "JobID,Submit,Start,End,ElapsedRaw,AllocTRES,ConsumedEnergyRaw"


@dataclass(frozen=True)
class Allocation:
    """What one start of a job was given, as sacct has it."""

    job: str
    ended: bool
    queued_s: int
    elapsed_s: int
    cores: int  # what SLURM calls a CPU: a core, or a thread of one
    cards: int | None  # None: none, or the cluster's accounting does not count them
    energy_j: int  # 0: not measured


@dataclass(frozen=True)
class _Submitted:
    """A run, what it knows of its starts, and all of its jobs."""

    run: Run
    starts: list[dict[str, Any]]
    jobs: set[str]

    def accounted(self, allocations: list[Allocation]) -> bool:
        """Return whether the accounting has each start of the run, to its end."""
        own = [one for one in allocations if one.job in self.jobs]
        return len(own) >= len(self.starts) and all(one.ended for one in own)


def write_costs(folders: list[Path]) -> None:
    """Write into the folder of each run that was submitted to SLURM what it has cost until now.

    The cost of a run that was not started since it was written stays as it is: an accounting forgets old jobs. Never
    raises for an accounting that is missing, or a folder that cannot be written, but says so.
    """
    submitted = [one for one in map(_read, folders) if one and not _is_complete(one)]
    try:
        allocations = _ask_until_complete(submitted) if submitted else []
    except UserError as error:
        why = str(error).splitlines()[-1]  # sacct tells of each layer below it, and last of what that means
        say(f"note: what the runs cost is known from their own records only: {why}")
        allocations = None
    for one in submitted:
        try:
            write_whole(one.run.path / COST_FILE, json.dumps(_cost(one, allocations), indent=1) + "\n")
        except OSError as error:
            say(f"warning: {one.run.path / COST_FILE} cannot be written ({error.strerror}): the report leaves it out")


def _read(folder: Path) -> _Submitted | None:
    """Return a run that was submitted to SLURM and has begun there; None for another."""
    try:
        record = jobs.read_job_record(folder)
        starts = Starts(folder).read()
        if record.get("executor") != "slurm" or not starts:
            return None
        earlier = {start["job"] for start in starts if start.get("job")}
        return _Submitted(load_run(folder), starts, {record["job"], *earlier})
    except UserError:  # the comparison says so, or launch.status
        return None


def _is_complete(one: _Submitted) -> bool:
    """Return whether the run's cost is written already, with all of its starts to their ends."""
    return one.run.cost.get("cost/complete") is True and one.run.cost["cost/starts"] == len(one.starts)


def _ask_until_complete(submitted: list[_Submitted]) -> list[Allocation]:
    """Ask for the starts of these runs until the end of none is missing that has ended, for PATIENCE seconds at most.

    Raises UserError where there is no accounting, or it does not answer.
    """
    asked = {job for one in submitted for job in one.jobs}
    since = min(map(_first_start, submitted)) - DAY  # earlier jobs with these numbers are not ours
    limit = time.monotonic() + PATIENCE
    while True:
        allocations = _ask(asked, since)
        ended = [one for one in submitted if one.run.status != "running"]
        if all(one.accounted(allocations) for one in ended) or time.monotonic() > limit:
            return allocations
        time.sleep(PAUSE)


def _first_start(one: _Submitted) -> float:
    times = [start["time"] for start in one.starts if "time" in start]
    return time.mktime(time.strptime(min(times), TIME_FORMAT)) if times else 0.0


def _ask(asked: set[str], since: float) -> list[Allocation]:
    arrays = ",".join(sorted({job.partition("_")[0] for job in asked}))
    after = time.strftime(TIME_FORMAT, time.localtime(max(since, 0)))
    # --duplicates: each start of a job that was queued again. Times in seconds since the epoch, whatever format the
    # user prefers: local ones jump where summer time begins.
    words = ("--duplicates", "--allocations", "--noheader", "--parsable2", f"--starttime={after}", f"--jobs={arrays}")
    text = slurm.run_checked("sacct", *words, f"--format={COLUMNS}", SLURM_TIME_FORMAT="%s")
    try:
        return [one for one in parse(text) if one.job in asked]
    except ValueError as error:
        raise UserError(f"sacct prints what is not understood ({error})") from None


def parse(text: str) -> list[Allocation]:
    """Return the starts in what sacct prints as COLUMNS, without those that were given nothing: they waited only.

    Raises ValueError for other text.
    """
    found = []
    for line in text.splitlines():
        job, submitted, started, ended, elapsed, tres, energy = line.split("|")
        given = dict(one.split("=", 1) for one in tres.split(",") if one)
        if "cpu" not in given:
            continue
        cards = [int(count) for name, count in given.items() if name.partition(":")[0] == "gres/gpu"]
        allocation = Allocation(
            job=job,
            ended=ended.isdigit(),
            queued_s=int(started) - int(submitted),
            elapsed_s=int(elapsed),
            cores=int(given["cpu"]),
            cards=int(given["gres/gpu"]) if "gres/gpu" in given else sum(cards) if cards else None,  # or by type only
            energy_j=int(energy or 0),
        )
        found.append(allocation)
    return found


def _cost(one: _Submitted, allocations: list[Allocation] | None) -> dict[str, Any]:
    """Return what cost.json holds. `allocations`: None where there is no accounting."""
    cost = {"cost/gathered": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")} | _own_times(one)
    if allocations is None:
        return cost
    own = [each for each in allocations if each.job in one.jobs]
    cost |= {"cost/complete": one.accounted(allocations), "cost/queued_s": sum(each.queued_s for each in own)}
    cost["cost/core_hours"] = sum(each.cores * each.elapsed_s for each in own) / HOUR
    if any(each.cards is not None for each in own):
        cost["cost/card_hours"] = sum((each.cards or 0) * each.elapsed_s for each in own) / HOUR
    elif one.run.summary.get("device", "cpu") != "cpu":
        cost["cost/card_hours"] = None  # it had cards, and the cluster's accounting does not count them
    if energy := sum(each.energy_j for each in own):
        cost["cost/energy_j"] = energy
    return cost


def _own_times(one: _Submitted) -> dict[str, Any]:
    """Return what the run's own records tell: of each start its seconds, and the steps that it trained again."""
    last = one.starts[-1]
    starts = [*one.starts[:-1], last | Starts(one.run.path).seconds(last)]
    timed = [start for start in starts if "trained_s" in start]
    # One that was ended before it trained has repeated nothing yet: the next one does.
    steps = sum(start.get("repeats", 0) for start in timed if start["trained_s"] > 0)
    epochs = one.run.metrics
    a_step = sum(epoch["time/train_s"] for epoch in epochs) / epochs[-1]["step"] if epochs else None
    return {
        "cost/starts": len(starts),
        "cost/untimed_starts": len(starts) - len(timed),
        "cost/starting_s": round(sum(start["starting_s"] for start in timed), 1),
        "cost/training_s": round(sum(start["trained_s"] for start in timed), 1),
        "cost/repeated_steps": steps,
        "cost/repeated_s": 0.0 if not steps else None if a_step is None else round(steps * a_step, 1),
    }
