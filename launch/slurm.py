"""Call SLURM's own commands, and read what they say about jobs. Works without accounting."""

import contextlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from fashion_ddp.errors import UserError

PATIENCE = 60.0  # seconds that a command gets; with a controller that is down, most give up after 10 to 20


@dataclass(frozen=True)
class QueuedJob:
    """A job that waits or runs, as squeue shows it."""

    state: str
    node: str
    time_left: str
    reason: str
    comment: str  # of the job, in which launch.submit puts its submission's name
    script: str  # the file that sbatch was given


@dataclass(frozen=True)
class Node:
    """A machine of the cluster, as sinfo shows it."""

    name: str
    in_service: bool  # neither down nor drained, as for a maintenance
    cores: int
    cards: int


def run(*words: str, patience: float = PATIENCE, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a SLURM command, with these variables in its environment, and return its output and exit code.

    Raises UserError where the command is not installed, or does not answer within `patience` seconds.
    """
    try:
        return subprocess.run(
            words,
            env=os.environ | variables,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=patience,
            check=False,
        )
    except FileNotFoundError:
        raise UserError(f"{words[0]} is not here: give the command on a machine of the cluster") from None
    except subprocess.TimeoutExpired:
        raise UserError(
            f"{words[0]} did not answer for {patience:.0f} s: the cluster's controller may be down"
        ) from None


def run_checked(*words: str, patience: float = PATIENCE, **variables: str) -> str:
    """Run a SLURM command and return what it prints. Raises UserError as `run` does, and where the command fails."""
    done = run(*words, patience=patience, **variables)
    if done.returncode:
        raise UserError(f"SLURM's {words[0]} failed: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def queued_jobs(users: Iterable[str]) -> dict[str, QueuedJob]:
    """Return these users' jobs that wait or run, by id (`7`, or `7_0` for a member of an array)."""
    format_ = "--format=%i|%T|%N|%L|%r|%k|%o"
    text = run_checked("squeue", f"--user={','.join(users)}", "--noheader", "--array", format_)
    return {(fields := line.split("|", 6))[0]: QueuedJob(*fields[1:]) for line in text.splitlines()}


def end_states(ids: Iterable[str]) -> dict[str, str]:
    """Return the states in which jobs ended, by id; nothing where the cluster has no accounting."""
    ids = list(ids)
    if not ids or shutil.which("sacct") is None:
        return {}
    try:
        text = run_checked("sacct", "--noheader", "--parsable2", "-X", "--format=JobID,State", "-j", ",".join(ids))
    except UserError:  # no accounting, or it is down: the run folders have to do
        return {}
    return {job: state.split()[0] for job, _, state in (line.partition("|") for line in text.splitlines()) if state}


def max_array_size() -> int:
    """Return how many jobs an array may have on this cluster."""
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", run_checked("scontrol", "show", "config"), flags=re.MULTILINE)
    return int(found[1]) if found else 1001  # SLURM's default


def describe_partitions() -> str:
    """Return one line that says what each partition has."""
    text = run_checked("sinfo", "--noheader", "--format=%R: %D x %c cores, %m MB, GPUs %G")
    return "; ".join(dict.fromkeys(text.replace("GPUs (null)", "no GPUs").splitlines()))


def nodes(partition: str = "") -> list[Node]:
    """Return the nodes of the cluster; with `partition` of this one, or of several separated by commas."""
    of = [f"--partition={partition}"] if partition else []
    text = run_checked("sinfo", "--noheader", "--Node", "--format=%N|%T|%c|%G", *of)
    found: dict[str, Node] = {}  # one that is in several partitions has a line for each
    for name, state, cores, cards in (line.split("|", 3) for line in text.splitlines()):
        counts = re.findall(r"\bgpu:(?:[^:,(]+:)?(\d+)", cards)
        found[name] = Node(name, not re.search("down|drain|fail|maint", state), int(cores), sum(map(int, counts)))
    return list(found.values())


def cluster_answers() -> bool:
    """Return whether this machine belongs to a cluster: SLURM's commands may be installed where there is none."""
    if shutil.which("sinfo") is None:
        return False
    try:
        run_checked("sinfo", "--noheader", patience=10)
    except UserError:
        return False
    return True


def on_login_node() -> bool:
    """Return whether this machine belongs to a cluster and this process to no job: most likely a login node."""
    return "SLURM_JOB_ID" not in os.environ and cluster_answers()


def own_job_id() -> str | None:
    """Return the id of the job that this process belongs to, as SLURM's commands expect it; None outside of SLURM."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    # One member of an array has the array's own id, which would mean all members.
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")


@contextlib.contextmanager
def hide_own_job() -> Iterator[None]:
    """Take the variables of this process's job out of os.environ for a while.

    SLURM sets them for this job, and they would change the jobs that it submits or starts.
    """
    kept = dict(os.environ)
    if "SLURM_JOB_ID" in kept:
        for name in kept:
            if name.startswith(("SLURM_", "SLURMD_", "SRUN_")) and name != "SLURM_CONF":
                del os.environ[name]
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(kept)
