"""What submitted runs are doing, as their folders and SLURM tell."""

import getpass
import json
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fashion_ddp.console import say
from fashion_ddp.errors import UserError
from fashion_ddp.files import write_whole
from fashion_ddp.report.text import Table, percent, terminal_table
from fashion_ddp.runs.lock import holder
from fashion_ddp.runs.reading import Run, load_run
from launch import slurm

NOTE = "job.json"  # in a run's folder: as which job it was last submitted
PAUSE = 10.0  # seconds between two looks at the queue


@dataclass(frozen=True)
class Seen:
    """One run."""

    run: Run
    note: dict[str, Any]  # of its last submission; empty where there was none
    queued: slurm.Queued | None
    state: str
    active: bool  # waits or runs: nobody else may begin it
    unknown: str = ""  # why it is not known whether it waits or runs

    @property
    def folder(self) -> Path:
        return self.run.path

    @property
    def job(self) -> str:
        return self.note.get("job", "")

    @property
    def finished(self) -> bool:
        return self.run.summary.get("status") == "finished" and not self.active


def note(folder: Path, submission: Path, executor: str, job: str, log: Path | None = None) -> None:
    """Write into a run's folder as which job it is submitted: for status, cancel and resubmit, from any shell.

    `job`: SLURM's id, or this process's where it runs the jobs itself.
    """
    known = {"executor": executor, "job": job, "submission": str(submission), "log": str(log or "")}
    known |= {"user": getpass.getuser(), "host": socket.gethostname()}
    write_whole(folder / NOTE, json.dumps(known, indent=1) + "\n")


def look(folders: list[Path]) -> list[Seen]:
    """What is known of the runs in these folders; those without a run are left out."""
    runs = [_read(folder) for folder in folders if (folder / "config.yaml").is_file()]
    notes = {run.path: _note(run.path) for run in runs}
    unfinished = [run.path for run in runs if run.summary.get("status") != "finished"]
    asked = [notes[path] for path in unfinished if notes[path].get("executor") == "slurm"]
    queue: dict[str, slurm.Queued] = {}
    unknown, ended = "", dict[str, str]()
    if asked:
        try:
            queue = slurm.queued({one["user"] for one in asked})
            ended = slurm.ended(one["job"] for one in asked if one["job"] not in queue)
        except UserError as error:
            unknown = str(error)
    return [_seen(run, notes[run.path], queue, ended, unknown if notes[run.path] in asked else "") for run in runs]


def _seen(run: Run, known: dict[str, Any], queue: dict[str, slurm.Queued], ended: dict[str, str], unknown: str) -> Seen:
    status, job = run.summary.get("status", "not begun"), known.get("job", "")
    if known.get("executor") == "slurm" and (queued := queue.get(job)) and known["submission"] in queued.script:
        # By its script, too: a cluster that shares these folders with another one counts its jobs by itself.
        waits = f" ({queued.reason})" if queued.state == "PENDING" and queued.reason != "None" else ""
        return Seen(run, known, queued, queued.state + waits, active=True)
    if status == "running":
        return Seen(run, known, None, status, active=True)
    if status != "finished" and known.get("executor") == "local" and holder(Path(known["submission"])):
        return Seen(run, known, None, "waiting", active=True)
    if unknown:
        return Seen(run, known, None, f"{status}, or queued", active=False, unknown=unknown)
    how = f" ({ended[job]})" if status != "finished" and ended.get(job, "COMPLETED") != "COMPLETED" else ""
    return Seen(run, known, None, status + how, active=False)


def _read(folder: Path) -> Run:
    """A run; one whose folder cannot be read is shown as such, beside the others."""
    try:
        return load_run(folder)
    except UserError as error:
        return Run(folder, {}, {"status": "damaged", "error": str(error)}, [], [], [])


def _note(folder: Path) -> dict[str, Any]:
    path = folder / NOTE
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): remove it, and the run counts as not submitted") from None


def table(seen: list[Seen]) -> Table:
    """One line per run."""
    columns: dict[str, Callable[[Seen], str]] = {
        "run": lambda one: one.folder.name,
        "job": lambda one: one.job,
        "state": lambda one: one.state,
        "epoch": lambda one: f"{_last(one).get('epoch', 0)}/{one.run.config.get('epochs', '?')}",
        "accuracy %": lambda one: percent(_last(one)["test/accuracy"]) if _last(one).get("test/accuracy") else "",
        "images/s": lambda one: f"{_last(one)['throughput/images_per_s']:,.0f}" if _last(one) else "",
        "restarts": lambda one: str(max(_starts(one) - 1, 0)),
        "node": lambda one: one.queued.node if one.queued else ", ".join(_hosts(one)),
        "time left": lambda one: one.queued.time_left if one.queued else "",
    }
    numeric = ("epoch", "accuracy %", "images/s", "restarts", "time left")
    rows = [[text(one) or "-" for text in columns.values()] for one in seen]
    return Table(list(columns), [title in numeric for title in columns], rows)


def _last(one: Seen) -> dict[str, Any]:
    return (one.run.metrics or [{}])[-1]


def _starts(one: Seen) -> int:
    """How often the run was started: by a launcher, or as far as training."""
    path = one.folder / "starts.jsonl"
    return max(len(one.run.environment), len(path.read_bytes().splitlines()) if path.exists() else 0)


def _hosts(one: Seen) -> list[str]:
    """Where the run was last started."""
    ranks = one.run.environment[-1]["ranks"] if one.run.environment else []
    return list(dict.fromkeys(rank["host"] for rank in ranks))


def follow(folders: list[Path], report_job: str) -> bool:
    """Show the runs, whenever something has changed, until the report is written. Returns whether all are finished."""
    shown: list[list[str]] = []
    while True:
        seen = look(folders)
        now = table(seen)
        if (changing := [row[:-1] for row in now.rows]) != shown:  # but for the time left
            say(f"{time.strftime('%H:%M:%S')}\n{terminal_table(now)}\n")
            shown = changing
        try:
            ended = not any(one.active or one.unknown for one in seen)
            if ended and report_job not in slurm.queued({getpass.getuser()}):
                return all(one.finished for one in seen)
        except UserError as error:  # a controller that is busy, or down for a while
            say(f"{error}; asked again")
        time.sleep(PAUSE)
