"""Submit runs to SLURM: models x seeds x a sweep as one job array, and the comparison as a job that follows it.

    python -m launch.submit --models linear relu cnn --seeds 0 1 2 --nodes 1 --gpus-per-node 4
    python -m launch.submit --models cnn --sweep lr=0.05,0.1 --validation 5000 --partition gpu --time 60
    python -m launch.submit --models cnn --gpus-per-node 4 --dry-run      shows what would be submitted; needs no SLURM

Further flags are those of fashion_ddp.train, for every run. Each rank is one task. Everything is validated before
anything is queued. A run that finished before with the same settings, code and versions is not trained again, and one
that was begun continues.

Exit code 0: submitted. 2: nothing was, because something must be corrected first. With --executor local or debug, and
with --wait, 1: some run is not finished, and the report says which. 75: stopped here, and the same command continues.
"""

import contextlib
import json
import os
import shlex
import shutil
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from fashion_ddp import data
from fashion_ddp.config import Config, flags, layers
from fashion_ddp.config.cli import Command
from fashion_ddp.config.names import is_path
from fashion_ddp.console import entry_point, say
from fashion_ddp.data.published import chosen_folder
from fashion_ddp.errors import UserError, pluralize
from fashion_ddp.files import write_whole
from fashion_ddp.runs import claim, lock, provenance
from fashion_ddp.runs.reading import load_run
from launch import jobs, sbatch, slurm, snapshot, starts, submitit_local
from launch.job import Report
from launch.sbatch import SubmissionPlan
from launch.site import Site, read_site
from launch.submission import Submission, commands

SHORT = 300  # seconds of a job of which a start may take a large part
WAIT = 60.0  # seconds for another submission to end
Md5 = dict[tuple[str, int], dict[str, str]]  # of each array of a dataset, by its name and the size of its pictures

SUBMISSION_FILE = "submission.json"  # in a submission's folder: all that is needed to submit its runs again


@entry_point
def main(argv: list[str] | None = None) -> int:
    asked, others = flags.parse_known(Submission, "launch.submit", argv)
    try:
        return _submit(asked, others)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted: nothing is queued by this command") from None


def _submit(submission: Submission, others: list[str]) -> int:
    site = read_site(submission.site)
    runs = [replace(one, run=_absolute(one.run)) for one in commands(submission, others, site.flags())]
    submission = replace(submission, out=submission.out.absolute())
    folders = [claim.folder_of(command.run) for command in runs]
    own_folder = _new_folder(folders[0].parent / ".submissions")
    reads = _reads([command.run for command in runs])
    plan = SubmissionPlan(submission, site, own_folder, own_folder / "code", reuse=runs[0].reuse, reads=reads)
    cards = submission.gpus_per_node or any(name.startswith(("gres", "gpu")) for name in plan.options())
    if not cards and any(command.run.device == "cuda" for command in runs):
        raise UserError("--device cuda, and no cards are asked for: give --gpus-per-node")
    if submission.executor != "slurm" and site.container and site.container.runtime == "pyxis":
        raise UserError(
            f"--executor {submission.executor}, and the site file's container is pyxis's, which is a part of srun: "
            "give another --site, or run the command in the container yourself"
        )
    _check_out(submission.out)
    if submission.executor == "slurm" and "%" in str(own_folder):
        raise UserError(
            f"{own_folder.parent}: SLURM reads % and the letter after it as a job's number or name, and would look for "
            "the logs elsewhere: choose a --runs-dir without %"
        )
    md5 = _check_data_and_models([command.run for command in runs], submission.dry_run)
    if submission.dry_run:
        _show(plan, [command.run for command in _choose(runs, site, md5)])
        return 0
    if submission.executor != "slurm":
        todo = _choose(runs, site, md5)
        with _nothing_left_unless_started(plan, todo):
            _claim(todo, site, md5)
            of_jobs = _folders(todo)  # once: their names go by a recipe that may be edited from here on
            report = _prepare(plan, of_jobs, folders)
        return submitit_local.run_all(plan, of_jobs, report)
    with _alone(own_folder.parent):
        todo = _choose(runs, site, md5)
        if not todo:
            runs_dir = shlex.quote(str(folders[0].parent))
            say(f"all are finished: `python -m fashion_ddp.compare {runs_dir}` compares them")
            return 0
        _check_with_slurm(plan, len(todo), [folders[0].parent, *(command.run.data_dir for command in runs[:1])])
        with _nothing_left_unless_started(plan, todo):
            _claim(todo, site, md5)
            last = _queue(plan, _folders(todo), folders)
    return _follow(plan, folders, last)


def _folders(runs: list[Command]) -> list[Path]:
    return [claim.folder_of(command.run) for command in runs]


def _choose(runs: list[Command], site: Site, md5: Md5) -> list[Command]:
    """Return the runs that must be trained. Raises UserError as `_must_run` does."""
    states = {state.folder: state for state in jobs.read_states(_folders(runs))}
    return [one for one in runs if _must_run(one, states.get(claim.folder_of(one.run)), site, md5)]


def _claim(todo: list[Command], site: Site, md5: Md5) -> None:
    """Make the runs' folders, or rename what is there, as training would."""
    for command in todo:
        made_by = _provenance(command.run, site, md5)
        run_folder = claim.claim(command.run, made_by, command.fresh, command.reuse)
        if run_folder.lock is not None:
            run_folder.lock.release()


@contextlib.contextmanager
def _nothing_left_unless_started(plan: SubmissionPlan, todo: list[Command]) -> Iterator[None]:
    """Within, folders are made; where it fails before any job is queued, those that were not there before go."""
    new = [folder for folder in _folders(todo) if not folder.exists()]
    try:
        yield
    except sbatch.PartlyQueued:
        raise
    except UserError:
        for folder in (*new, plan.folder):
            shutil.rmtree(folder, ignore_errors=True)
        raise


@contextlib.contextmanager
def _alone(submissions: Path) -> Iterator[None]:
    """Let no other submission into these run folders check what is queued, until what this one queues is known."""
    ours = [folder for folder in (submissions, submissions.parent) if not folder.exists()]
    try:
        own = lock.acquire_within(submissions, WAIT)
    except OSError as error:
        raise UserError(f"{submissions}: cannot be written ({error.strerror}): choose another --runs-dir") from None
    except UserError:
        raise UserError(
            f"another submission into {submissions.parent} is under way ({lock.holder(submissions)}): give the "
            "command again when it has ended"
        ) from None
    try:
        with own.kept():
            yield
    finally:
        own.release()
        with contextlib.suppress(OSError):  # where nothing was submitted, nothing is left
            for folder in ours:
                folder.rmdir()


def _new_folder(submissions: Path) -> Path:
    """Return the path of a new submission's folder: the time, and random digits."""
    return submissions / f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:4]}"


def _absolute(cfg: Config) -> Config:
    """Make the run's paths absolute, so that a job finds them from any folder and without this shell's variables."""
    paths: dict[str, Any] = {"runs_dir": cfg.runs_dir, "run_dir": cfg.run_dir, "data_dir": chosen_folder(cfg.data_dir)}
    paths["cache_dir"] = cfg.cache_dir
    absolute: dict[str, Any] = {name: path.absolute() for name, path in paths.items() if path is not None}
    if cfg.recipe not in layers.recipe_names():
        absolute["recipe"] = os.path.abspath(cfg.recipe)
    if cfg.init_from not in (None, "pretrained"):
        absolute["init_from"] = os.path.abspath(str(cfg.init_from))
    if is_path(cfg.dataset):
        absolute["dataset"] = os.path.abspath(cfg.dataset)
    return replace(cfg, **absolute)


def _reads(configs: list[Config]) -> tuple[Path, ...]:
    """Return the folders and files that the runs name, all absolute by now."""
    found: list[Path | None] = []
    for cfg in configs:
        found += [claim.folder_of(cfg).parent, cfg.data_dir, cfg.cache_dir]
        found += [Path(text) for text in (cfg.dataset, str(cfg.init_from)) if os.path.isabs(text)]
    for model in {cfg.model for cfg in configs if cfg.init_from == "pretrained"}:
        from fashion_ddp.models import library  # imports torch

        if path := library.published(model).find():
            found += [path.parent, path.resolve().parent]  # in the hub's cache it is a link
    return tuple(dict.fromkeys(path for path in found if path is not None))


def _check_out(out: Path) -> None:
    parent = next(folder for folder in (out, *out.parents) if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"--out {out}: {parent} is no folder that can be written: choose another one")


def _check_data_and_models(configs: list[Config], dry_run: bool) -> Md5:
    """Load the data and build the models, so that the user does not learn only from the jobs what is wrong with them.

    Returns the md5 sums of each dataset that is here. Raises UserError for data that is missing or damaged, and for a
    user's model that does not fit.
    """
    md5: Md5 = {}
    for cfg in {(cfg.dataset, cfg.data_dir, data.picture_settings(cfg)): cfg for cfg in configs}.values():
        if cfg.dataset in data.PUBLISHED and data.locate(cfg.dataset, cfg.data_dir) is None:
            if dry_run:
                say(f"note: {cfg.dataset} is not on this machine")
                return {}
            if cfg.data_dir is None:
                data.fetch(cfg.dataset)
        loaded = data.load_for(cfg)
        md5[cfg.dataset, cfg.image_size] = loaded.md5
    snapshot.user_packages([name for cfg in configs for name in (cfg.model, cfg.dataset, cfg.metrics or "")])

    def doubtful(cfg: Config) -> tuple[Any, ...]:
        """What may keep a model from being built; all of it is empty for our own as they are."""
        whose = cfg.model if ":" in cfg.model else "", cfg.model_args, cfg.keep_batch_norm
        return *whose, cfg.init_from, cfg.freeze, cfg.micro_batch, cfg.reduction_shards

    for cfg in {(cfg.model, doubtful(cfg)): cfg for cfg in configs if any(doubtful(cfg))}.values():
        from fashion_ddp.models import architectures, transfer  # import torch

        model = architectures.build(cfg, loaded.image_shape, len(loaded.classes))
        transfer.prepare(cfg, model, loaded.image_shape)
    return md5


def _must_run(command: Command, state: jobs.RunState | None, site: Site, md5: Md5) -> bool:
    """Return whether a run must be trained; False where it is finished.

    Raises UserError where it is queued or running, where its folder holds another run, and where other code or versions
    made it.
    """
    folder = claim.folder_of(command.run)
    if state and state.unknown:
        raise UserError(f"{folder}: it is not clear whether its job {state.job} is still queued: {state.unknown}")
    if state and state.active:
        by = f"job {state.job}" if state.queued else lock.holder(folder) or f"process {state.job}"
        cancel = f"python -m launch.status cancel {shlex.quote(str(folder))}"
        raise UserError(f"{folder} is {state.state} ({by}): wait for it, or `{cancel}`")
    if claim.check(command.run, _provenance(command.run, site, md5), command.fresh, command.reuse) == "finished":
        say(f"{folder}: finished before, with the same settings, code and versions: taken as it is")
        return False
    return True


def _provenance(cfg: Config, site: Site, md5: Md5) -> dict[str, Any]:
    """Return the code, versions and data that a job of this submission would record.

    Where the site names another Python, its versions are not known here: assume those that the run's last start had.
    Where the dataset is not here, assume the md5 sums of that start.
    """
    folder = claim.folder_of(cfg)
    starts = load_run(folder).environment if (folder / "config.yaml").is_file() else []
    before = starts[-1].get("made_by", {}) if starts else {}
    now = provenance.made_by(cfg, md5.get((cfg.dataset, cfg.image_size), before.get("data", {})))
    without_versions = {name: value for name, value in now.items() if name not in provenance.versions()}
    return before | without_versions if (site.python or site.container) and before else now


def _check_with_slurm(plan: SubmissionPlan, count: int, folders: list[Path | None]) -> None:
    """Ask SLURM whether it accepts the jobs, and warn of folders that its machines may not see."""
    sbatch.check(plan, count)
    if local := sbatch.local_folders([folder for folder in (*folders, Path(sys.prefix)) if folder]):
        say(f"warning: {', '.join(local)}: file systems that other machines do not see, as it seems")


def _show(plan: SubmissionPlan, configs: list[Config]) -> None:
    """Print what would be submitted: each run's settings, and the scripts for sbatch."""
    for cfg in configs:
        say(f"--- {claim.folder_of(cfg)}\n{cfg.to_yaml()}")
    if plan.submission.executor != "slurm" or not configs:
        return
    say(f"--- sbatch, for {pluralize(len(configs), 'run')}\n{plan.run_script(len(configs))}")
    say(f"--- sbatch, for the comparison\n{plan.report_script()}")
    if slurm.cluster_answers():
        say(f"--- SLURM here would take them: {sbatch.check(plan, len(configs))}")


def _prepare(plan: SubmissionPlan, todo: list[Path], folders: list[Path]) -> Report:
    """Write what the jobs of the runs in the folders `todo` need, and return what compares those in `folders`."""
    submission = plan.submission
    try:
        plan.folder.mkdir(parents=True)
        if not plan.code.exists() and submission.executor != "debug":
            configs = [load_run(folder).settings() for folder in todo]
            snapshot.take(plan.code, [name for cfg in configs for name in (cfg.model, cfg.dataset, cfg.metrics or "")])
        write_whole(plan.folder / SUBMISSION_FILE, json.dumps(_record(plan, folders), indent=1, default=str) + "\n")
    except OSError as error:
        first = error.args[0][0][-1] if isinstance(error, shutil.Error) else error.strerror  # it lists each file
        raise UserError(f"{plan.folder}: cannot be written ({first}): choose another --runs-dir") from None
    return Report(tuple(map(str, folders)), str(submission.out), bool(submission.sweep))


def _queue(plan: SubmissionPlan, todo: list[Path], folders: list[Path]) -> str:
    """Queue the runs in the folders `todo`, which are there already with their settings, and the comparison of those in
    `folders`. Return the comparison's job."""
    report = _prepare(plan, todo, folders)
    ids, last = sbatch.submit(plan, todo, report)
    for folder, job in zip(todo, ids, strict=True):
        say(f"job {job}  {folder}")
    out = plan.submission.out
    for folder in todo:
        if too_slow := starts.advice(starts.Starts(folder).read()):
            say(f"warning: {folder}: {too_slow}")
    left = 60 * plan.submission.minutes - sbatch.signal_ahead(plan.submission.minutes)
    if left < SHORT:
        say(
            f"warning: with --time {plan.submission.time} a job has {left:.0f} s before it is told to save, of which "
            "its start takes 10 to 60 s on a busy machine"
        )
    say(f"{pluralize(len(todo), 'run')} submitted; job {last} compares them when all have ended, into {out}")
    say(f"next: python -m launch.status {shlex.quote(str(todo[0].parent))}")
    return last


def _follow(plan: SubmissionPlan, folders: list[Path], last: str) -> int:
    """Where that is asked for, wait until the comparison has ended. Return the exit code."""
    if not plan.submission.wait:
        return 0
    try:
        return int(not jobs.follow(folders, last))
    except KeyboardInterrupt:
        say("no longer followed; the jobs go on")
        return 130


def _record(plan: SubmissionPlan, folders: list[Path]) -> dict[str, Any]:
    """Return what `resubmit` needs, as JSON has it."""
    asked = asdict(plan.submission) | {"wait": False, "site": None}
    record = {"command": sys.argv, "asked": asked, "site": asdict(plan.site), "runs": folders}
    return record | {"code": plan.code, "cwd": plan.cwd, "reuse": plan.reuse, "reads": plan.reads}


def resubmit(todo: list[Path], submission_folder: Path, exclude: str = "") -> int:
    """Submit runs again as they were submitted before, with the same code. Return the exit code.

    `exclude`: nodes, as SLURM writes them, that these jobs are not to get, in addition to those excluded before.
    """
    path = submission_folder / SUBMISSION_FILE
    try:
        record = json.loads(path.read_text())
        given: Any = {name: tuple(v) if isinstance(v, list) else v for name, v in record["asked"].items()}
        submission = Submission(**given | {"out": Path(given["out"]), "time": str(given["time"])})
        site = Site.from_record(record["site"])
        new = _new_folder(submission_folder.parent)
        code, cwd, reads = Path(record["code"]), Path(record["cwd"]), tuple(map(Path, record.get("reads", ())))
        plan = SubmissionPlan(submission, site, new, code, cwd, record["reuse"], reads)
        folders = [Path(run) for run in record["runs"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be used ({error}): submit these runs anew, with launch.submit") from None
    entry = plan.code / "launch" / ("submitit_local.py" if submission.executor == "local" else "job.py")
    if submission.executor != "debug" and not entry.is_file():
        raise UserError(
            f"the code that these runs were submitted with is gone from {plan.code}, or too old: submit them anew"
        )
    if submission.executor != "slurm":
        if exclude:
            raise UserError(f"--exclude {exclude}: these runs were submitted to this machine alone, and to no cluster")
        return submitit_local.run_all(plan, todo, _prepare(plan, todo, folders))
    if exclude:
        both = ",".join(dict.fromkeys(filter(None, [str(plan.options().get("exclude", "")), exclude])))
        plan = replace(plan, submission=replace(submission, slurm=(*submission.slurm, f"exclude={both}")))
    with _alone(new.parent):
        if active := [state for state in jobs.read_states(todo) if state.active]:
            raise UserError(
                f"{active[0].folder} is {active[0].state} (job {active[0].job}) by now: nothing is submitted"
            )
        _check_with_slurm(plan, len(todo), [submission_folder])
        last = _queue(plan, todo, folders)
    return _follow(plan, folders, last)


if __name__ == "__main__":
    sys.exit(main())
