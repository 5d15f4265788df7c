"""Submit runs to SLURM through Submitit: the options for sbatch, and the queueing of all runs or none."""

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
from submitit.slurm import slurm as submitit_slurm

from fashion_ddp.console import say
from fashion_ddp.distributed import signals
from fashion_ddp.errors import UserError
from fashion_ddp.private import private, untested
from launch import jobs, slurm
from launch.job import AGAIN, Rank, Report
from launch.site import SbatchOptions, Site, parse_options
from launch.submission import ON_CPU, Submission

SIGNAL_AHEAD = 120  # seconds before its end at which a job gets a signal
TEARDOWN = ["code=$?", *Path(__file__).with_name("requeue.sh").read_text().splitlines()]
# Beginnings of options of sbatch that the comparison does not get: it needs one core.
NOT_FOR_REPORT = ("dependency", "exclusive", "nodelist", "gres", "gpu", "cpus-per-gpu", "mem-per-gpu")
# Folders on these are most often visible on one machine only.
LOCAL_FILE_SYSTEMS = {"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "overlay", "tmpfs", "apfs"}
NOT_BEFORE = "not before"  # so SLURM's answer begins that is no, and may be yes when nodes come back


class PartlyQueued(UserError):
    """The submission failed when some of its jobs were queued already; the text says what became of them."""


def signal_ahead(minutes: int) -> int:
    """Return how many seconds before its end a job of so many minutes gets a signal."""
    return min(SIGNAL_AHEAD, 30 * minutes)


@dataclass(frozen=True)
class SubmissionPlan:
    """What every job of a submission gets: resources, options, environment, code."""

    submission: Submission
    site: Site
    folder: Path  # of the submission: its record, the code, and Submitit's files
    code: Path  # a snapshot, of this submission or of an earlier one
    cwd: Path = field(default_factory=Path.cwd)
    reuse: bool = False  # continue runs that other code began
    reads: tuple[Path, ...] = ()  # folders and files that the runs read and write, for a container

    @property
    def python(self) -> str:
        """The shell words with which a job calls Python."""
        if self.site.container is None:
            return self.site.python or shlex.quote(sys.executable)
        cards = self.submission.gpus_per_node > 0
        return self.site.container.prefix(self._mounts(), self.cwd, cards) + (self.site.python or "python3")

    def _mounts(self) -> list[Path]:
        out = self.submission.out
        made = next(folder for folder in (out, *out.parents) if folder.exists())
        return [self.folder.parent.parent, self.code, self.cwd, made, *self.reads]

    def _container_args(self) -> list[str]:
        if self.site.container is None:
            return []
        return self.site.container.srun_args(self._mounts(), self.cwd, self._variables())

    def _variables(self) -> list[str]:
        return ["PYTHONSAFEPATH", "PYTHONPATH", *self.site.environment]

    def options(self) -> SbatchOptions:
        """Return the options for sbatch that the user gave: those of the command win over those of the site file."""
        asked, site = self.submission, self.site.slurm
        flags: SbatchOptions = {
            name: value for name in ("partition", "account") if (value := getattr(asked, name)) is not None
        }
        if asked.mem_per_rank is not None and asked.memory is not None:
            site = {name: value for name, value in site.items() if not name.startswith("mem")}
            flags["mem"] = asked.memory
        defaults: SbatchOptions = {"requeue": True, "chdir": str(self.cwd)}
        given = defaults | site | flags | parse_options(asked.slurm)
        # By it a job is known in the queue. A cluster may need the rest, for accounting.
        return given | {"comment": f"{given.get('comment', '')} {self.folder.name}".strip()}

    def run_parameters(self, after: str = "") -> dict[str, Any]:
        """Return Submitit's parameters for the jobs that train, with one task per rank.

        `after`: the id of an array of jobs that have to end before.
        """
        cores = self.submission.cpus_per_rank
        given = _with_memory(self.options(), self.submission.memory) | (
            {"dependency": f"afterany:{after}"} if after else {}
        )
        return self._common_parameters(given) | {
            "setup": [*self.setup(), f"export {AGAIN}={shlex.quote(str(self.folder))}/again-$SLURM_JOB_ID"],
            "teardown": TEARDOWN,
            "job_name": "fashion_ddp",
            "nodes": self.submission.nodes,
            "ntasks_per_node": self.submission.ranks,
            "cpus_per_task": cores,
            # Per node and not per task: each rank must see the others' cards to talk to them.
            "gpus_per_node": self.submission.gpus_per_node or None,
            "time": self.submission.minutes,
            "signal_delay_s": signal_ahead(self.submission.minutes),
            "array_parallelism": self.submission.at_once,
            # A rank that fails ends the step. Ranks that have finished wait while the first one ends W&B. srun of SLURM
            # 22.05 to 23.02 forgets a task's cores, and a site may have it drop the variables that are set here.
            "srun_args": [
                *("--kill-on-bad-exit=1", "--wait=180", f"--cpus-per-task={cores}", "--export=ALL"),
                *self._container_args(),
            ],
        }

    def report_parameters(self, arrays: str) -> dict[str, Any]:
        """Return Submitit's parameters for the job that compares the runs when all of them have ended, in any way.

        `arrays`: the ids of the runs' arrays of jobs, separated by colons.
        """
        runs_alone = (*NOT_FOR_REPORT, "mem") if self.submission.mem_per_rank else NOT_FOR_REPORT
        given = {name: value for name, value in self.options().items() if not name.startswith(runs_alone)}
        given = _with_memory(given, ON_CPU)
        return self._common_parameters(given | {"kill-on-invalid-dep": "yes"} | self.site.report) | {
            "job_name": "fashion_ddp-report",
            "nodes": 1,
            "ntasks_per_node": 1,
            "cpus_per_task": 1,
            "time": 30,
            "dependency": f"afterany:{arrays}",
            "srun_args": ["--export=ALL", *self._container_args()],
        }

    def _common_parameters(self, given: SbatchOptions) -> dict[str, Any]:
        given = {name: value for name, value in given.items() if value is not False}
        # No wckey: some clusters refuse the accounting key that Submitit sets by itself.
        return {
            "setup": self.setup(),
            "stderr_to_stdout": True,
            "wckey": None,
            "additional_parameters": given,
        }

    def setup(self) -> list[str]:
        """Return the shell lines that a job runs before its tasks start."""
        # The ranks save at these, and the shell waits for them: it must not die of one that it gets, too.
        lines = [
            "trap : USR1 USR2",
            *self.site.setup,
            *(f"export {name}={shlex.quote(v)}" for name, v in self.site.environment.items()),
        ]
        # Python must find the code as it was submitted before that of the folder that the job starts in.
        path = ":".join(shlex.quote(str(folder)) for folder in (self.code, self.cwd))
        lines += [f'export PYTHONSAFEPATH=1 PYTHONPATH={path}"${{PYTHONPATH:+:$PYTHONPATH}}"']
        if self.site.container is not None:
            lines += self.site.container.setup(self._variables())
        unwanted = "RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT FASHION_DDP_LAUNCHER"
        return [*lines, f"unset {unwanted}  # of the shell that submitted"]

    def run_script(self, count: int) -> str:
        """Return the script that sbatch gets for `count` runs."""
        return self._script(self.run_parameters() | {"map_count": count if count > 1 else None})

    def report_script(self, arrays: str = "JOB") -> str:
        return self._script(self.report_parameters(arrays))

    def _script(self, parameters: dict[str, Any]) -> str:
        command = f"{self.python} -u -m submitit.core._submit {shlex.quote(str(self.folder))}"
        make = private(submitit_slurm, "_make_sbatch_string")
        try:
            return make(command=command, folder=self.folder, **parameters)
        except TypeError as error:
            raise UserError(untested("submitit", f"makes the text for sbatch otherwise ({error})")) from None

    def executor(self, **parameters: Any) -> submitit.SlurmExecutor:
        # Submitit takes every signal in a job of up to ten minutes for a time-out: allow any number of them.
        executor = submitit.SlurmExecutor(self.folder, max_num_timeout=10**6, python=self.python)
        executor.update_parameters(**parameters)
        return executor


def _with_memory(given: SbatchOptions, memory: str | None) -> SbatchOptions:
    """Return options with this memory of a node, where they say nothing of memory and ask for no whole nodes."""
    told = any(name.startswith("mem") for name in given) or given.get("exclusive", False) is not False
    return given if told or memory is None else given | {"mem": memory}


def check(plan: SubmissionPlan, count: int) -> str:
    """Ask SLURM whether it would accept `count` runs. Returns its answer; raises UserError where it would not.

    Where it says no because nodes are out of service, as in a maintenance, it queues the jobs: that is a warning.
    """
    if shutil.which("sbatch") is None:
        raise UserError(
            "sbatch is not here: submit on a machine of the cluster, or see what would be submitted with --dry-run, "
            "or use this machine with --executor local"
        )
    count = min(count, slurm.max_array_size())
    report = plan.report_script().replace("#SBATCH --dependency=afterany:JOB\n", "")
    runs = _test_only(plan.run_script(count), plan)
    if runs.startswith(NOT_BEFORE):
        say(f"warning: SLURM would start these jobs {runs}")
    else:
        _test_only(report)
    return runs


def _awaited(plan: SubmissionPlan) -> list[str]:
    """Return the nodes out of service without which too few have the cores and cards of a job; none where enough have
    them, or too few at any time."""
    asked, partition = plan.submission, str(plan.options().get("partition", ""))
    cores = asked.ranks * asked.cpus_per_rank
    fit = [one for one in slurm.nodes(partition) if one.cores >= cores and one.cards >= asked.gpus_per_node]
    away = [one.name for one in fit if not one.in_service]
    return away if len(fit) - len(away) < asked.nodes <= len(fit) else []


def _test_only(script: str, plan: SubmissionPlan | None = None) -> str:
    """Return SLURM's answer. Raises UserError for a no, but where nodes out of service may be why jobs of this plan
    cannot start."""
    with tempfile.NamedTemporaryFile("w", suffix=".sh") as file, slurm.hide_own_job():
        file.write(script)
        file.flush()
        done = slurm.run("sbatch", "--test-only", file.name)
    said = " ".join(line.removeprefix("sbatch: ").removeprefix("error: ") for line in done.stderr.splitlines())
    if done.returncode == 0:
        return said
    said = said.replace("allocation failure: ", "")
    if plan and "configuration is not available" in said and (awaited := _awaited(plan)):
        return f"{NOT_BEFORE} nodes are back that are out of service (`sinfo -R` says why): {', '.join(awaited)}"
    what = f"SLURM would not take these jobs: {said}"
    if re.search("partition|configuration", said):
        with contextlib.suppress(UserError):
            what += f". What there is: {slurm.describe_partitions()}"
    raise UserError(what)


def submit(plan: SubmissionPlan, todo: list[Path], report: Report) -> tuple[list[str], str]:
    """Queue the runs in the folders `todo`, and the comparison. Return the ids of the runs' jobs, and the comparison's.

    Either all are queued, and each run's folder says as which job, or none is. More runs than an array may have here
    are several arrays, one after another, so that no more than --at-once are trained at a time. Raises UserError where
    SLURM did not take the runs, PartlyQueued where it took some of the jobs and not all.
    """
    ids: list[str] = []
    arrays: list[str] = []
    most = slurm.max_array_size()
    # Submitit prints the error that it also raises.
    with _signals_off(), slurm.hide_own_job(), contextlib.redirect_stderr(io.StringIO()):
        try:
            for first in range(0, len(todo), most):
                runs = plan.executor(**plan.run_parameters(after=":".join(arrays[-1:])))
                some = todo[first : first + most]
                with runs.batch():
                    queued = [runs.submit(Rank(str(f), plan.submission.max_restarts, plan.reuse)) for f in some]
                arrays.append(queued[0].job_id.partition("_")[0])
                ids += [job.job_id for job in queued]
                for folder, job in zip(some, queued, strict=True):
                    jobs.write_job_record(folder, plan.folder, "slurm", job.job_id, job.paths.stdout)
            last = plan.executor(**plan.report_parameters(":".join(arrays))).submit(report)
        except (utils.FailedJobError, utils.FailedSubmissionError, OSError) as error:
            if not arrays:
                raise UserError(f"SLURM did not take the jobs: {error}") from None
            try:
                slurm.run_checked("scancel", *arrays)
                others = "the others are cancelled"
            except UserError as still_there:
                others = f"the others could not be cancelled ({still_there}): scancel {' '.join(arrays)}"
            raise PartlyQueued(f"SLURM did not take all jobs; {others}: {error}") from None
    return ids, last.job_id


@contextlib.contextmanager
def _signals_off() -> Iterator[None]:
    """Ignore Ctrl-C and block the other signals: between two jobs they would leave jobs that nobody knows of."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with signals.blocked():
            yield
    finally:
        signal.signal(signal.SIGINT, before)


def local_folders(folders: list[Path], table: Path = Path("/proc/mounts")) -> list[str]:
    """Return those folders that other machines probably do not see, each with the type of its file system."""
    try:
        mounts = [line.split() for line in table.read_text().splitlines()]
    except OSError:  # not Linux
        return []
    found = []
    for folder in folders:
        over = [(len(where), at, kind) for at, (_, where, kind, *_) in enumerate(mounts) if _is_below(folder, where)]
        kind = max(over)[2] if over else ""  # of several mounts at one place, the last counts
        if kind in LOCAL_FILE_SYSTEMS:
            found.append(f"{folder} ({kind})")
    return found


def _is_below(folder: Path, mounted: str) -> bool:
    return folder.resolve().is_relative_to(mounted.replace("\\040", " "))
