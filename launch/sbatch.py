"""How runs are submitted to SLURM, by way of Submitit: the options for sbatch, and the queueing of all or none."""

import contextlib
import io
import re
import shlex
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import submitit
from submitit.core import utils
from submitit.slurm.slurm import _make_sbatch_string

from fashion_ddp.distributed import signals
from fashion_ddp.errors import UserError
from launch import jobs, slurm
from launch.job import Rank, Report
from launch.site import Options, Site, options
from launch.submission import Submission

WARNING = 120  # seconds before its end at which a job is told
# Beginnings of options of sbatch that the comparison, on one core, does not get.
FOR_RUNS = ("dependency", "exclusive", "nodelist", "gres", "gpu", "cpus-per-gpu", "mem-per-gpu")
# On these a folder is one machine's own, most often.
LOCAL_FILE_SYSTEMS = {"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "overlay", "tmpfs", "apfs"}


class NotQueued(UserError):
    """A submission that failed with nothing of it in the queue."""


@dataclass(frozen=True)
class Plan:
    """How every run of a submission is to be run."""

    asked: Submission
    site: Site
    base: Path  # the submission's folder: its record, the code, and Submitit's files
    code: Path  # a snapshot, of this submission or of an earlier one
    cwd: Path = field(default_factory=Path.cwd)
    reuse: bool = False  # go on with runs that other code began

    @property
    def python(self) -> str:
        """How a job calls Python, as shell."""
        return self.site.python or shlex.quote(sys.executable)

    def options(self) -> Options:
        """What the user says to sbatch: the command's words over those of the site."""
        flags: Options = {
            name: value for name in ("partition", "account") if (value := getattr(self.asked, name)) is not None
        }
        ours: Options = {"requeue": True, "chdir": str(self.cwd)}
        return ours | self.site.slurm | flags | options(self.asked.slurm)

    def of_runs(self) -> dict[str, Any]:
        """Submitit's parameters of jobs with one task per rank."""
        cores = self.asked.cpus_per_rank
        return self._of_all(self.options()) | {
            "job_name": "fashion_ddp",
            "nodes": self.asked.nodes,
            "ntasks_per_node": self.asked.ranks,
            "cpus_per_task": cores,
            # Per node and not per task: each rank must see the others' cards to talk to them.
            "gpus_per_node": self.asked.gpus_per_node or None,
            "time": self.asked.time,
            "signal_delay_s": min(WARNING, 30 * self.asked.time),
            "array_parallelism": self.asked.at_once,
            # A rank that fails ends the step; one that is ready waits for W&B on the first; srun of SLURM 22.05 to
            # 23.02 forgets a task's cores, and a site may have told it to forget the variables set here.
            "srun_args": ["--kill-on-bad-exit=1", "--wait=180", f"--cpus-per-task={cores}", "--export=ALL"],
        }

    def of_report(self, array: str) -> dict[str, Any]:
        """Submitit's parameters of the job that compares the runs when all of them have ended, in whatever way."""
        given = {name: value for name, value in self.options().items() if not name.startswith(FOR_RUNS)}
        return self._of_all(given | {"kill-on-invalid-dep": "yes"} | self.site.report) | {
            "job_name": "fashion_ddp-report",
            "nodes": 1,
            "ntasks_per_node": 1,
            "cpus_per_task": 1,
            "time": 30,
            "dependency": f"afterany:{array}",
            "srun_args": ["--export=ALL"],
        }

    def _of_all(self, given: Options) -> dict[str, Any]:
        given = {name: value for name, value in given.items() if value is not False}
        # Without Submitit's own accounting key, which some clusters refuse.
        return {"setup": self.setup(), "stderr_to_stdout": True, "wckey": None, "additional_parameters": given}

    def setup(self) -> list[str]:
        """Lines of shell before a job's tasks start."""
        lines = [*self.site.setup, *(f"export {name}={shlex.quote(v)}" for name, v in self.site.environment.items())]
        # The code as it was submitted, before that of the folder that the job starts in.
        path = ":".join(shlex.quote(str(folder)) for folder in (self.code, self.cwd))
        lines += [f'export PYTHONSAFEPATH=1 PYTHONPATH={path}"${{PYTHONPATH:+:$PYTHONPATH}}"']
        left = "RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT FASHION_DDP_LAUNCHER"
        return [*lines, f"unset {left}  # of the shell that submitted"]

    def text(self, count: int) -> str:
        """What sbatch is given for so many runs."""
        return self._text(self.of_runs() | {"map_count": count if count > 1 else None})

    def report_text(self, array: str = "JOB") -> str:
        return self._text(self.of_report(array))

    def _text(self, parameters: dict[str, Any]) -> str:
        command = f"{self.python} -u -m submitit.core._submit {shlex.quote(str(self.base))}"
        return _make_sbatch_string(command=command, folder=self.base, **parameters)

    def executor(self, **parameters: Any) -> submitit.SlurmExecutor:
        # Submitit's own count of time-outs takes every signal in a job of ten minutes for one.
        executor = submitit.SlurmExecutor(self.base, max_num_timeout=10**6, python=self.python)
        executor.update_parameters(**parameters)
        return executor


def check(plan: Plan, count: int) -> str:
    """Ask SLURM whether it would take so many runs. Returns what it expects; raises UserError where it would not."""
    if shutil.which("sbatch") is None:
        raise UserError(
            "sbatch is not here: submit on a machine of the cluster, or see what would be submitted with --dry-run, "
            "or use this machine with --executor local"
        )
    if count > (most := slurm.largest_array()):
        raise UserError(f"{count} runs are more than an array may have here ({most}): submit them in parts")
    report = plan.report_text().replace("#SBATCH --dependency=afterany:JOB\n", "")
    expected = [_test(text) for text in (plan.text(count), report)]
    return expected[0]


def _test(text: str) -> str:
    with tempfile.NamedTemporaryFile("w", suffix=".sh") as file, slurm.outside_of_a_job():
        file.write(text)
        file.flush()
        done = slurm.ask("sbatch", "--test-only", file.name)
    said = " ".join(line.removeprefix("sbatch: ").removeprefix("error: ") for line in done.stderr.splitlines())
    if done.returncode == 0:
        return said
    what = f"SLURM would not take these jobs: {said.replace('allocation failure: ', '')}"
    if re.search("partition|configuration", said):
        with contextlib.suppress(UserError):
            what += f". What there is: {slurm.machines()}"
    raise UserError(what)


def submit(plan: Plan, todo: list[Path], report: Report) -> tuple[list[str], str]:
    """Queue the runs in these folders, and the comparison. Returns the ids of the runs' jobs, and the comparison's.

    Either all are queued, and each run's folder says as which job, or none is.
    """
    array, said = "", io.StringIO()
    tasks = [Rank(str(folder), plan.asked.max_restarts, plan.reuse) for folder in todo]
    # Submitit prints what it also raises.
    with _undisturbed(), slurm.outside_of_a_job(), contextlib.redirect_stderr(said):
        try:
            runs = plan.executor(**plan.of_runs())
            with runs.batch():
                queued = [runs.submit(task) for task in tasks]
            array = queued[0].job_id.partition("_")[0]
            for folder, job in zip(todo, queued, strict=True):
                jobs.note(folder, plan.base, "slurm", job.job_id, job.paths.stdout)
            last = plan.executor(**plan.of_report(array)).submit(report)
        except (utils.FailedJobError, utils.FailedSubmissionError, OSError) as error:
            if not array:
                raise NotQueued(f"SLURM did not take the jobs: {error}") from None
            slurm.call("scancel", array)
            raise UserError(f"SLURM did not take the job that compares; the others are cancelled: {error}") from None
    return [job.job_id for job in queued], last.job_id


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Without Ctrl-C and the like, which between two jobs would leave some that nobody knows of."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with signals.blocked():
            yield
    finally:
        signal.signal(signal.SIGINT, before)


def not_shared(folders: list[Path], table: Path = Path("/proc/mounts")) -> list[str]:
    """Those of these folders that other machines do not see, as it seems, each with its file system's type."""
    try:
        mounts = [line.split() for line in table.read_text().splitlines()]
    except OSError:  # not Linux
        return []
    found = []
    for folder in folders:
        over = [(len(where), at, kind) for at, (_, where, kind, *_) in enumerate(mounts) if _is_below(folder, where)]
        kind = max(over)[2] if over else ""  # of mounts at one place, the last is seen
        if kind in LOCAL_FILE_SYSTEMS:
            found.append(f"{folder} ({kind})")
    return found


def _is_below(folder: Path, mounted: str) -> bool:
    return folder.resolve().is_relative_to(mounted.replace("\\040", " "))
