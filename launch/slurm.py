"""What SLURM says of itself and of jobs, by its own commands. Works where there is no accounting."""

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
class Queued:
    """A job as squeue shows it."""

    state: str
    node: str
    time_left: str
    reason: str
    script: str  # the file that sbatch was given


def ask(*words: str, patience: float = PATIENCE) -> subprocess.CompletedProcess[str]:
    """What a SLURM command answers, yes or no. Raises UserError where it does not."""
    try:
        return subprocess.run(
            words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=patience, check=False
        )
    except FileNotFoundError:
        raise UserError(f"{words[0]} is not here: give the command on a machine of the cluster") from None
    except subprocess.TimeoutExpired:
        raise UserError(
            f"{words[0]} did not answer for {patience:.0f} s: the cluster's controller may be down"
        ) from None


def call(*words: str, patience: float = PATIENCE) -> str:
    """A SLURM command's output. Raises UserError with what it says where it fails."""
    done = ask(*words, patience=patience)
    if done.returncode:
        raise UserError(f"SLURM's {words[0]} failed: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def queued(users: Iterable[str]) -> dict[str, Queued]:
    """These users' jobs that wait or run, by id (`7`, or `7_0` for a member of an array)."""
    text = call("squeue", f"--user={','.join(users)}", "--noheader", "--array", "--format=%i|%T|%N|%L|%r|%o")
    return {(one := line.split("|", 5))[0]: Queued(*one[1:]) for line in text.splitlines()}


def ended(ids: Iterable[str]) -> dict[str, str]:
    """How jobs ended, where accounting is there to tell."""
    ids = list(ids)
    if not ids or shutil.which("sacct") is None:
        return {}
    try:
        text = call("sacct", "--noheader", "--parsable2", "-X", "--format=JobID,State", "-j", ",".join(ids))
    except UserError:  # no accounting, or it is down: the run folders tell the rest
        return {}
    return {job: state.split()[0] for job, _, state in (line.partition("|") for line in text.splitlines()) if state}


def largest_array() -> int:
    """How many jobs an array may have here."""
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", call("scontrol", "show", "config"), flags=re.MULTILINE)
    return int(found[1]) if found else 1001  # SLURM's own


def machines() -> str:
    """What the partitions have."""
    text = call("sinfo", "--noheader", "--format=%R: %D x %c cores, %m MB, GPUs %G")
    return "; ".join(dict.fromkeys(text.replace("GPUs (null)", "no GPUs").splitlines()))


def answers() -> bool:
    """Whether a cluster is here: its commands may be installed where none is."""
    if shutil.which("sinfo") is None:
        return False
    try:
        call("sinfo", "--noheader", patience=10)
    except UserError:
        return False
    return True


def is_outside_of_a_job() -> bool:
    """Whether this is a machine of a cluster, and no job: a login node, most likely."""
    return "SLURM_JOB_ID" not in os.environ and answers()


def own_id() -> str | None:
    """The job that this process belongs to, as scontrol wants to be told; None outside SLURM."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    # An array member's own id equals the array's for one of them, and would mean all.
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")


@contextlib.contextmanager
def outside_of_a_job() -> Iterator[None]:
    """As if this process belonged to none: what SLURM told its job would shape those that it submits or starts."""
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


def preempted_with_grace(job: str) -> bool:
    """Whether a job that was told SIGTERM runs on for a while because it is preempted.

    SIGTERM may also mean scancel, a time limit, or a requeue by SLURM itself; in all of these the job is on its way
    out already, and to requeue it would raise a cancelled job from the dead.
    """
    shown = call("scontrol", "show", "job", job)
    fields = dict(re.findall(r"(\w+)=(\S*)", shown))
    return fields.get("JobState") == "RUNNING" and fields.get("PreemptTime", "None") != "None"
