"""Show submitted runs, cancel them, or submit them again.

    python -m launch.status [FOLDERS...]             a table (by default of runs/)
    python -m launch.status cancel [FOLDERS...]      ends what waits or runs; what was trained stays saved
    python -m launch.status resubmit [FOLDERS...]    submits again what failed, was cancelled or never began;
                                                     with --exclude NODES not on these nodes

Works without accounting: for jobs that SLURM no longer knows, the run folders have the state.
"""

import os
import shlex
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fashion_ddp.config import default_runs_dir, flags
from fashion_ddp.console import entry_point, say
from fashion_ddp.errors import UserError, pluralize
from fashion_ddp.report.text import terminal_table
from fashion_ddp.runs.lock import holder
from fashion_ddp.runs.reading import find_runs
from launch import jobs, slurm, starts, submit
from launch.jobs import RunState


@dataclass(frozen=True)
class Arguments:
    """Show, cancel or resubmit submitted runs."""

    words: flags.Positional[tuple[str, ...]] = ()
    """First `cancel` or `resubmit`, or neither for a table; then run folders, or folders of run folders."""
    exclude: str = ""
    """With resubmit: nodes that these jobs are not to get from now on, as n3,n[7-9]."""


def show(states: list[RunState]) -> int:
    """Print a table of the runs, their logs, and what to do next."""
    say(terminal_table(jobs.table(states)))
    for one in states:
        if one.active and one.job_record.get("log"):
            say(f"follow {one.folder.name}: tail -n +1 -F {shlex.quote(one.job_record['log'])}")
        elif not one.finished and (one.job_record or "error" in one.run.summary):
            why = one.given_up or one.run.summary.get("error") or "its folder does not say why"
            say(f"{one.folder.name}: {why}; log: {shlex.quote(jobs.log_that_tells(one.job_record))}")
        elif "stopped_early" in one.run.summary:
            say(f"{one.folder.name}: stopped early {one.run.summary['stopped_early']}")
    for one in states:
        if one.queued and "held" in one.queued.reason.lower():
            say(f"{one.folder.name}: SLURM holds its job: `scontrol release {one.job}` lets it go on")
    for one in states:
        nodes, why = ("", "") if one.active or one.finished else jobs.bad_nodes(one)
        if nodes:
            say(f"{one.folder.name}: {nodes} may be at fault ({why}): `resubmit --exclude {nodes}` avoids it")
    for one in states:
        if not one.finished and (too_slow := starts.advice(one.starts)):
            say(f"{one.folder.name}: {too_slow}")
    if unknown := next((one.unknown for one in states if one.unknown), ""):
        say(f"it is not clear which of them are queued: {unknown}")
    elif any(not one.active and not one.finished and one.job_record for one in states):
        say("`python -m launch.status resubmit` continues the runs that are neither finished nor queued")
    return 0


def cancel(states: list[RunState]) -> int:
    """Cancel the runs' jobs. Their ranks save first, and the jobs are not queued again."""
    _refuse_unknown(states)
    queued = [one for one in states if one.queued is not None]
    if queued:
        slurm.run_checked("scancel", *(one.job for one in queued))
    for one in queued:
        begun = "what it trained is saved, and resubmit continues it" if one.run.metrics else "resubmit begins it anew"
        say(f"{one.folder}: job {one.job} is cancelled; {begun}")
    here = [one for one in states if one.active and one.queued is None]
    local = [
        one for one in here if one.job_record.get("executor") == "local" and holder(Path(one.job_record["submission"]))
    ]
    for submission in dict.fromkeys(one.job_record["submission"] for one in local):
        _end_local([one for one in local if one.job_record["submission"] == submission])
    for one in here:
        if one not in local:
            say(f"{one.folder} is running, and not as a job: end it where it was started ({holder(one.folder)})")
    if not queued and not here:
        say("none of these runs waits or runs")
    return 0


def _end_local(group: list[RunState]) -> None:
    """Stop a submission that runs without SLURM: all its runs, as Ctrl-C would."""
    record = group[0].job_record
    if record["host"] != socket.gethostname():
        raise UserError(f"{group[0].folder} runs on {record['host']}: give the command there")
    os.kill(int(record["job"]), signal.SIGTERM)
    runs = pluralize(len(group), "run")
    say(f"process {record['job']}, with {runs}, was asked to end: it saves, and resubmit continues")


def resubmit(states: list[RunState], exclude: str = "") -> int:
    """Submit the runs again that are neither finished nor queued, as they were submitted before; not on the nodes
    `exclude`, as SLURM writes them."""
    _refuse_unknown(states)
    todo = [one for one in states if not one.active and not one.finished]
    if unsubmitted := [str(one.folder) for one in todo if not one.job_record]:
        raise UserError(f"not submitted by launch.submit, and so resubmit does not know how: {', '.join(unsubmitted)}")
    if not todo:
        say("nothing to do: every run is finished, or queued")
    groups: dict[str, list[Path]] = {}
    for one in todo:
        groups.setdefault(one.job_record["submission"], []).append(one.folder)
    return max(
        (submit.resubmit(folders, Path(submission), exclude) for submission, folders in groups.items()), default=0
    )


def _refuse_unknown(states: list[RunState]) -> None:
    if unknown := next((one.unknown for one in states if one.unknown), ""):
        raise UserError(f"it is not clear which of these runs are queued: {unknown}")


@entry_point
def main(argv: list[str] | None = None) -> int:
    arguments = flags.parse(Arguments, "launch.status", argv)
    words = arguments.words
    verbs: dict[str, Callable[[list[RunState]], int]] = {
        "cancel": cancel,
        "resubmit": partial(resubmit, exclude=arguments.exclude),
    }
    verb = verbs.get(words[0] if words else "", show)
    if arguments.exclude and words[:1] != ("resubmit",):
        raise UserError("--exclude goes with resubmit: python -m launch.status resubmit --exclude NODES FOLDERS")
    folders = [Path(word) for word in words[verb is not show :]]
    return verb(jobs.read_states(find_runs(folders or [default_runs_dir()])))


if __name__ == "__main__":
    sys.exit(main())
