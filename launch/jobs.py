"""Read the state of submitted runs from their folders and from SLURM."""

import getpass
import json
import re
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fashion_ddp.console import say
from fashion_ddp.distributed.failures import LOST_RANK
from fashion_ddp.errors import UserError
from fashion_ddp.files import write_whole
from fashion_ddp.report.text import Table, percent, terminal_table
from fashion_ddp.runs.lock import holder
from fashion_ddp.runs.reading import Run, load_run
from launch import slurm
from launch.starts import Starts, count_ends

JOB_FILE = "job.json"  # in a run's folder: the job that it was last submitted as
# What a node that may be bad makes a rank say. A full card, or an assertion in a kernel, is the run's own.
CARD_BROKE = re.compile(r"CUDA error: (?!out of memory|device-side assert)")
NAMES_NODE = (
    (re.compile(r"rank \d+ on (\S+): NCCL failed with "), "NCCL failed there"),
    (re.compile(r"^error: (\S+): --device cuda, but torch finds no NVIDIA card", re.MULTILINE), "it shows no card"),
)
PAUSE = 10.0  # seconds between two looks at the queue


@dataclass(frozen=True)
class RunState:
    """What is known about one run."""

    run: Run
    job_record: dict[str, Any]  # the content of JOB_FILE; empty where the run was never submitted
    queued: slurm.QueuedJob | None
    state: str
    active: bool  # waits or runs: nobody else may start it
    starts: list[dict[str, Any]]  # as launch/starts.py has them
    unknown: str = ""  # why nobody can say whether it waits or runs

    @property
    def folder(self) -> Path:
        return self.run.path

    @property
    def job(self) -> str:
        return self.job_record.get("job", "")

    @property
    def given_up(self) -> str:
        """Why its job was given up; "" where it was not."""
        return _given_up(self.starts, self.job)

    @property
    def finished(self) -> bool:
        return self.run.summary.get("status") == "finished" and not self.active


def write_job_record(folder: Path, submission: Path, executor: str, job: str, log: Path | None = None) -> None:
    """Write into a run's folder as which job it is submitted: status, cancel and resubmit read it, in any shell.

    `job`: SLURM's id, or the id of this process where it runs the jobs itself.
    """
    record = {"executor": executor, "job": job, "submission": str(submission), "log": str(log or "")}
    record |= {"user": getpass.getuser(), "host": socket.gethostname()}
    write_whole(folder / JOB_FILE, json.dumps(record, indent=1) + "\n")


def read_states(folders: list[Path]) -> list[RunState]:
    """Return the state of the run in each folder; folders without a run are left out."""
    runs = [_read_run(folder) for folder in folders if (folder / "config.yaml").is_file()]
    records = {run.path: read_job_record(run.path) for run in runs}
    unfinished = [run.path for run in runs if run.summary.get("status") != "finished"]
    on_slurm = [records[path] for path in unfinished if records[path].get("executor") == "slurm"]
    queue: dict[str, slurm.QueuedJob] = {}
    unknown, end_states = "", dict[str, str]()
    if on_slurm:
        try:
            queue = slurm.queued_jobs({record["user"] for record in on_slurm})
            end_states = slurm.end_states(record["job"] for record in on_slurm if record["job"] not in queue)
        except UserError as error:
            unknown = str(error)
    why_unknown = {run.path: unknown if records[run.path] in on_slurm else "" for run in runs}
    return [_state(run, records[run.path], queue, end_states, why_unknown[run.path]) for run in runs]


def _state(
    run: Run, record: dict[str, Any], queue: dict[str, slurm.QueuedJob], end_states: dict[str, str], unknown: str
) -> RunState:
    status, job = run.summary.get("status", "not begun"), record.get("job", "")
    starts = Starts(run.path).read()
    if record.get("executor") == "slurm" and (queued := queue.get(job)) and _is_of(queued, record["submission"]):
        waits = f" ({queued.reason})" if queued.state == "PENDING" and queued.reason != "None" else ""
        return RunState(run, record, queued, queued.state + waits, True, starts)
    if status == "running":
        return RunState(run, record, None, status, True, starts)
    if status != "finished" and record.get("executor") == "local" and holder(Path(record["submission"])):
        return RunState(run, record, None, "waiting", True, starts)
    if unknown:
        return RunState(run, record, None, f"{status}, or queued", False, starts, unknown)
    ended = f" ({end_states[job]})" if status != "finished" and end_states.get(job, "COMPLETED") != "COMPLETED" else ""
    if status != "finished" and _given_up(starts, job):
        status = "given up"
    return RunState(run, record, None, status + ended, False, starts)


def _given_up(starts: list[dict[str, Any]], job: str) -> str:
    return starts[-1].get("given_up", "") if starts and starts[-1].get("job") == job else ""


def log_that_tells(record: dict[str, Any]) -> str:
    """Return the path of that rank's log which tells why a job failed, "" where none is known: the first with an error
    that is not another rank's, else rank 0's."""
    first = record.get("log", "")
    if not first:
        return ""
    of_ranks = sorted(Path(first).parent.glob(Path(first).name.replace("_0_log.out", "_*_log.out")))
    for path in of_ranks:
        text = path.read_text(errors="replace")
        if re.search(r"^(Traceback|error: )", text, re.MULTILINE) and LOST_RANK not in text:
            return str(path)
    return first


def bad_nodes(state: RunState) -> tuple[str, str]:
    """Return which nodes may be why a run ended, as --exclude takes them, and what tells so; two "" where none is."""
    if "(NODE_FAIL)" in state.state and state.starts:
        return state.starts[-1].get("nodes", ""), "a node failed"
    if waited := re.search(r"all wait for (.+)", state.run.summary.get("error", "")):
        nodes = re.findall(r"rank \d+ on ([^\s,;]+)", waited[1])
        return ",".join(dict.fromkeys(nodes)), "the other ranks waited for it in vain"
    path = Path(log_that_tells(state.job_record))
    text = path.read_text(errors="replace") if path.is_file() else ""
    for sign, why in NAMES_NODE:
        if named := sign.search(text):
            return named[1], why
    rank = re.search(r"_(\d+)_log\.out$", path.name)
    if rank and CARD_BROKE.search(text) and state.run.environment:
        return state.run.environment[-1]["ranks"][int(rank[1])]["host"], "a card failed there"
    return "", ""


def _is_of(queued: slurm.QueuedJob, submission: str) -> bool:
    """Return whether a job is of this submission: another cluster that shares these folders may have a job with the
    same number. squeue shows a script's path with each % of it changed, and some clusters drop comments."""
    return Path(submission).name in queued.comment or submission in queued.script


def _read_run(folder: Path) -> Run:
    """Read a run. One that cannot be read is shown as damaged, beside the others."""
    try:
        return load_run(folder)
    except UserError as error:
        return Run(folder, {}, {"status": "damaged", "error": str(error)}, [], [], [])


def read_job_record(folder: Path) -> dict[str, Any]:
    """Return as which job a run was last submitted; {} where it never was. Raises UserError for a damaged file."""
    path = folder / JOB_FILE
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): remove it, and the run counts as not submitted") from None


def table(states: list[RunState]) -> Table:
    """Return a table with one line per run."""
    names = [one.folder.name for one in states]
    columns: dict[str, Callable[[RunState], str]] = {
        "run": lambda one: str(one.folder) if names.count(one.folder.name) > 1 else one.folder.name,
        "job": lambda one: one.job,
        "state": lambda one: one.state,
        "epoch": lambda one: f"{_last_epoch(one).get('epoch', 0)}/{one.run.config.get('epochs', '?')}",
        "accuracy %": lambda one: percent(accuracy) if (accuracy := _figures(one).get("test/accuracy")) else "",
        "images/s": lambda one: f"{_last_epoch(one)['throughput/images_per_s']:,.0f}" if _last_epoch(one) else "",
        "interrupted": lambda one: _ends(one)[0],
        "failed": lambda one: _ends(one)[1],
        "node": lambda one: one.queued.node if one.queued else ", ".join(_last_hosts(one)),
        "time left": lambda one: one.queued.time_left if one.queued else "",
    }
    numeric = ("epoch", "accuracy %", "images/s", "interrupted", "failed", "time left")
    rows = [[text(one) or "-" for text in columns.values()] for one in states]
    return Table(list(columns), [title in numeric for title in columns], rows)


def _last_epoch(state: RunState) -> dict[str, Any]:
    return (state.run.metrics or [{}])[-1]


def _figures(state: RunState) -> dict[str, Any]:
    """Return what the summary says, which of a run that kept an earlier epoch are that one's figures, and beside it the
    last epoch's."""
    return _last_epoch(state) | state.run.summary


def _ends(state: RunState) -> tuple[str, str]:
    """Return how many starts were ended from outside, and how many failed; "" for a run that no launcher counted."""
    waits = state.queued is not None and state.queued.state == "PENDING"
    starts = [*state.starts, {"job": state.job}] if waits else state.starts
    interrupted, failed = count_ends(starts, over=not (state.active or state.finished or state.unknown))
    return (str(interrupted), str(failed)) if state.starts or state.job_record else ("", "")


def _last_hosts(state: RunState) -> list[str]:
    """Return the hosts of the run's last start."""
    ranks = state.run.environment[-1]["ranks"] if state.run.environment else []
    return list(dict.fromkeys(rank["host"] for rank in ranks))


def follow(folders: list[Path], report_job: str) -> bool:
    """Print the table whenever something has changed, until the report is written. Return whether all are finished."""
    shown: list[list[str]] = []
    while True:
        states = read_states(folders)
        now = table(states)
        if (changing := [row[:-1] for row in now.rows]) != shown:  # without the time left, which always changes
            say(f"{time.strftime('%H:%M:%S')}\n{terminal_table(now)}\n")
            shown = changing
        try:
            ended = not any(one.active or one.unknown for one in states)
            if ended and report_job not in slurm.queued_jobs({getpass.getuser()}):
                return all(one.finished for one in states)
        except UserError as error:  # a controller that is busy, or down for a while
            say(f"{error}; asking again")
        time.sleep(PAUSE)
