"""Submitted runs: what they are doing, and what to do about them.

    python -m launch.status [FOLDERS...]             a table (by default of runs/)
    python -m launch.status cancel [FOLDERS...]      ends what waits or runs; what was trained stays saved
    python -m launch.status resubmit [FOLDERS...]    submits again what failed, was cancelled or never began

Works without accounting: what SLURM no longer knows, the run folders tell.
"""

import os
import shlex
import signal
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

from fashion_ddp.config import default_runs_dir, flags
from fashion_ddp.console import entry_point, say
from fashion_ddp.errors import UserError, pluralize
from fashion_ddp.report.text import terminal_table
from fashion_ddp.runs.lock import holder
from fashion_ddp.runs.reading import find_runs
from launch import jobs, slurm, submit
from launch.jobs import Seen


@dataclass(frozen=True)
class Command:
    """Show, cancel or resubmit submitted runs."""

    words: flags.Positional[tuple[str, ...]] = ()
    """First `cancel` or `resubmit`, or neither for a table; then run folders, or folders of run folders."""


def show(seen: list[Seen]) -> int:
    say(terminal_table(jobs.table(seen)))
    for one in seen:
        log = shlex.quote(one.note.get("log", ""))
        if one.active and log:
            say(f"follow {one.folder.name}: tail -n +1 -F {log}")
        elif not one.finished and (one.note or "error" in one.run.summary):
            say(f"{one.folder.name}: {one.run.summary.get('error') or 'no word of it in its folder'}; log: {log}")
    if unknown := next((one.unknown for one in seen if one.unknown), ""):
        say(f"which of them are queued is not known: {unknown}")
    elif any(not one.active and not one.finished and one.note for one in seen):
        say("what is neither finished nor queued: `python -m launch.status resubmit` continues it")
    return 0


def cancel(seen: list[Seen]) -> int:
    """End jobs. Their ranks save first; they are not queued again."""
    _must_know(seen)
    jobs = [one for one in seen if one.queued is not None]
    if jobs:
        slurm.call("scancel", *(one.job for one in jobs))
    for one in jobs:
        say(f"{one.folder}: job {one.job} is cancelled; what it trained is saved, and resubmit continues it")
    here = [one for one in seen if one.active and one.queued is None]
    local = [one for one in here if one.note.get("executor") == "local" and holder(Path(one.note["submission"]))]
    for submission in dict.fromkeys(one.note["submission"] for one in local):
        _end_local([one for one in local if one.note["submission"] == submission])
    for one in here:
        if one not in local:
            say(f"{one.folder} is running as no job: end it where it was started ({holder(one.folder)})")
    if not jobs and not here:
        say("none of these runs waits or runs")
    return 0


def _end_local(group: list[Seen]) -> None:
    """End a submission that runs on a machine itself: all of it, as Ctrl-C would."""
    note = group[0].note
    if note["host"] != socket.gethostname():
        raise UserError(f"{group[0].folder} runs on {note['host']}: give the command there")
    os.kill(int(note["job"]), signal.SIGTERM)
    say(f"process {note['job']} is told to end, with {pluralize(len(group), 'run')}: it saves, and resubmit continues")


def resubmit(seen: list[Seen]) -> int:
    """Submit again, as they were submitted, the runs that are neither finished nor queued."""
    _must_know(seen)
    todo = [one for one in seen if not one.active and not one.finished]
    if unsubmitted := [str(one.folder) for one in todo if not one.note]:
        raise UserError(f"not submitted by launch.submit, so that it is not known how: {', '.join(unsubmitted)}")
    if not todo:
        say("nothing to do: every run is finished, or queued")
    groups: dict[str, list[Path]] = {}
    for one in todo:
        groups.setdefault(one.note["submission"], []).append(one.folder)
    return max((submit.again(folders, Path(submission)) for submission, folders in groups.items()), default=0)


def _must_know(seen: list[Seen]) -> None:
    if unknown := next((one.unknown for one in seen if one.unknown), ""):
        raise UserError(f"which of these runs are queued cannot be told: {unknown}")


@entry_point
def main(argv: list[str] | None = None) -> int:
    words = flags.parse(Command, "launch.status", argv).words
    verb = {"cancel": cancel, "resubmit": resubmit}.get(words[0] if words else "", show)
    folders = [Path(word) for word in words[verb is not show :]]
    return verb(jobs.look(find_runs(folders or [default_runs_dir()])))


if __name__ == "__main__":
    sys.exit(main())
