"""Do the work of one task of a submitted job: train as one rank of a run, or compare all runs.

A job's pickle holds paths and nothing else. Everything that a run needs when it is started again, by us or by SLURM, is
in its folder: the settings, the checkpoints, and the list of its starts. The names of the two classes must stay:
`launch.status resubmit` pickles them for jobs that run the code of an earlier submission.
"""

import contextlib
import os
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fashion_ddp.config import cli
from fashion_ddp.console import entry_point, say
from fashion_ddp.distributed import machine, signals
from fashion_ddp.distributed.failures import LOST_RANK
from fashion_ddp.distributed.rendezvous import RENDEZVOUS_TIMEOUT, free_port
from fashion_ddp.errors import Stopped, UserError
from fashion_ddp.runs import claim
from launch import slurm
from launch.starts import FAILED, FINISHED, KILLED, Starts

AGAIN = "FASHION_DDP_AGAIN"  # names the file by whose word the batch script knows whether to queue its job again


@dataclass(frozen=True)
class Rank:
    """Train as one rank of the run in a folder, as a task of Submitit."""

    folder: str
    max_restarts: int = 100
    reuse: bool = False  # continue a run that other code began

    @entry_point
    def __call__(self) -> str:
        signals.listen()  # instead of Submitit's handlers, which requeue in the middle of a step
        from submitit import JobEnvironment

        env = JobEnvironment()
        _set_rank(env.global_rank, env.num_tasks, env.local_rank, env.num_tasks // env.num_nodes)
        argv = ["--config", str(Path(self.folder) / "config.yaml"), "--run-dir", self.folder]
        argv += ["--reuse"] * self.reuse
        try:
            return train_rank(argv, Path(self.folder), self.max_restarts)
        except UserError as error:
            error.of_rank = True  # as each has a log of its own
            raise

    def checkpoint(self) -> Any:
        """Tell Submitit, where a signal comes before our own handlers are set, to start the same task again."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def _set_rank(rank: int, world_size: int, local_rank: int, local_world_size: int) -> None:
    values = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": local_rank, "LOCAL_WORLD_SIZE": local_world_size}
    os.environ.update({name: str(value) for name, value in values.items()})


def train_rank(argv: list[str], folder: Path, max_restarts: int) -> str:
    """Train in this folder with the flags `argv`, as the rank that the environment names. Return how it ended.

    Raises what training raises, and exits with os.EX_TEMPFAIL where it is stopped and no batch script takes over.
    """
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    single_node = os.environ["LOCAL_WORLD_SIZE"] == os.environ["WORLD_SIZE"]
    starts = Starts(folder)
    word = Word()
    if rank == 0:
        starts.begin(max_restarts, killed=word.take() == KILLED)
        word.begin()
    signals.leave_while_starting(partial(_leave, rank, starts, word))
    if world_size > 1:
        host, port = _agree_on_address(folder, rank, single_node)
        os.environ |= {"MASTER_ADDR": host, "MASTER_PORT": port}
    else:
        for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            del os.environ[name]
    from fashion_ddp import train

    try:
        train.run(argv)
    except Stopped as stopped:
        if rank > 0:
            return "stopped"  # not an exit code: srun would kill the first rank, which has more to do
        say(str(stopped))
        starts.end(stopped.reason)
        if word.leave(stopped.reason):
            return "stopped"
        sys.exit(os.EX_TEMPFAIL)
    except Exception as error:
        signals.leave_if_asked(patience=5.0)  # it may be that another rank was asked to end, a moment earlier
        if rank == 0:
            starts.end(FAILED)
        if LOST_RANK not in str(error):  # an error of its own comes again
            word.take()
        raise
    if rank == 0:
        starts.end(FINISHED)
        _forget_address(folder)
    return FINISHED


def _leave(rank: int, starts: Starts, word: "Word", reason: str) -> int:
    """End a start that has not come to train. Return the exit code."""
    if rank > 0:
        return 0  # as above
    say(f"stopped ({reason}) before it trained: the same command continues")
    starts.end(reason)
    return 0 if word.leave(reason) else os.EX_TEMPFAIL


def _agree_on_address(folder: Path, rank: int, single_node: bool) -> tuple[str, str]:
    """Return host and port for the rendezvous. Rank 0 finds a free port and writes both to the folder for the others.

    A port computed from the job's number could belong to another job on the same node, or be an ephemeral one. Raises
    UserError where the port cannot be read in time.
    """
    job = slurm.own_job_id() or os.environ.get("SUBMITIT_LOCAL_JOB_ID")
    start = f"{job}-{os.environ.get('SLURM_RESTART_COUNT', '0')}"
    path = folder / f".meet-{start}"
    if rank == 0:
        host = "127.0.0.1" if single_node else machine.host_name()
        _forget_address(folder)
        new = folder / f".new-meet-{start}"
        new.write_text(f"{host} {free_port()}")
        new.rename(path)
    limit = time.monotonic() + RENDEZVOUS_TIMEOUT
    while not path.exists():
        if time.monotonic() > limit:
            raise UserError(
                f"rank {rank} on {machine.host_name()} waited {RENDEZVOUS_TIMEOUT:.0f} s for rank 0 to write {path}: "
                f"is {folder.parent} on a file system that all machines share?"
            )
        time.sleep(0.1)
        list(folder.iterdir())  # makes NFS ask its server again
    host, port = path.read_text().split()
    return host, port


def _forget_address(folder: Path) -> None:
    for path in folder.glob(".meet-*"):
        path.unlink(missing_ok=True)


class Word:
    """The word by which a job's ranks and its batch script (launch/requeue.sh) tell whether to queue it again.

    "begun" until it is stopped, then the signal's name; no file where an error would only come again. The script leaves
    KILLED for the next start. Where no such script runs there is none, and all of this does nothing.
    """

    def __init__(self) -> None:
        self.path = Path(os.environ[AGAIN]) if AGAIN in os.environ and slurm.own_job_id() else None

    def take(self) -> str:
        """Remove the word, which a full disk allows. Return it, "" where there is none."""
        if self.path is None:
            return ""
        try:
            word = self.path.read_text().strip()
            self.path.unlink()
        except OSError:
            return ""
        return word

    def begin(self) -> None:
        """Say that this start has begun, and that it may be begun again."""
        if self.path is not None:
            with contextlib.suppress(OSError):  # of a full disk the run itself will tell
                self.path.write_text("begun")

    def leave(self, reason: str) -> bool:
        """Say that a signal has stopped it. Return whether the script will read that.

        A word that another rank has taken away, because it failed, stays away.
        """
        if self.path is None:
            return False
        try:
            with open(os.open(self.path, os.O_WRONLY | os.O_TRUNC), "w") as file:
                file.write(reason)
        except OSError:
            return False
        return True


@dataclass(frozen=True)
class Report:
    """Compare runs when all of them have ended. Exits with 1, after the report is written, where one is missing."""

    folders: tuple[str, ...]
    out: str
    ranked: bool = False

    def __call__(self) -> str:
        from launch import sweep

        return sweep.compare_runs([Path(folder) for folder in self.folders], Path(self.out), self.ranked)

    def checkpoint(self) -> Any:
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


@entry_point
def main(argv: list[str] | None = None) -> int:
    """Train as a rank that srun started: `srun python -m launch.job --model cnn`; flags are fashion_ddp.train's."""
    env, argv = os.environ, sys.argv[1:] if argv is None else argv
    if "SLURM_PROCID" not in env:
        raise UserError("launch.job is what srun starts, see slurm/train.sbatch; here use python -m fashion_ddp.train")
    world_size = int(env["SLURM_NTASKS"])
    local_world_size = world_size // int(env["SLURM_NNODES"])
    _set_rank(int(env["SLURM_PROCID"]), world_size, int(env["SLURM_LOCALID"]), local_world_size)
    if "SLURM_CPUS_PER_TASK" in env and not any(word.startswith("--threads") for word in argv):
        argv = [*argv, "--threads", env["SLURM_CPUS_PER_TASK"]]  # a rank may be bound to its own cores already
    folder = claim.folder_of(cli.parse(argv).run)
    folder.mkdir(parents=True, exist_ok=True)
    train_rank(argv, folder, max_restarts=100)
    return 0


if __name__ == "__main__":
    signals.listen()
    sys.exit(main())
