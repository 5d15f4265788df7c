"""Train many runs on this machine, and compare them: one after another on all that it has, or several at once. What
`make compare` does.

    python -m launch.local --models linear relu mlp cnn --recipe blog --seeds 42
    python -m launch.local --models cnn --seeds 0 1 2 --epochs 10       further flags are those of fashion_ddp.train
    python -m launch.local --seeds 0 1 2 --jobs 4                       four at once, each on a card of its own

A finished run of the same settings, code and versions is taken as it is. Exit code 0: all finished; 1: some failed,
and the report says which; 2: nothing was started, because something must be mended first; 75: stopped, and the same
command continues.
"""

import os
import shlex
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from fashion_ddp.distributed import signals

if __name__ == "__main__":
    signals.listen()  # before slow imports

from fashion_ddp import compare, data
from fashion_ddp.config import Config, cli
from fashion_ddp.console import broken_pipe_ok, fail, say
from fashion_ddp.errors import TrainingFailed, UserError
from fashion_ddp.redact import restrict_umask
from fashion_ddp.runs import claim, provenance
from launch import pool, slurm
from launch.processes import Job, Running
from launch.share import announce_apart
from launch.submission import check_flags, refuse_twins, shared_group


@dataclass(frozen=True)
class Comparison:
    """Which runs to make and compare. Any further flag is one of fashion_ddp.train, for all of them."""

    models: tuple[str, ...] = ("linear", "relu", "mlp", "cnn")
    """Architectures to train."""
    recipe: str = "blog"
    """Set of training settings: blog, lab, or the path of a YAML file."""
    seeds: tuple[int, ...] = (42,)
    """Each architecture is trained once per seed."""
    ranks: int = 0
    """Ranks of each run; 0 takes one per card, or on a CPU one per core up to four; with --jobs, one."""
    jobs: int = 1
    """Runs at once. Each has a card of its own (with --ranks R: R cards), or on a CPU its share of the cores; their
    times are shared, and marked so."""
    out: Path = Path("report")
    """Folder of the report."""
    force: tyro.conf.FlagCreatePairsOff[bool] = False
    """Train on a login node of a SLURM cluster all the same."""


def main(argv: list[str] | None = None) -> int:
    restrict_umask()
    try:
        with broken_pipe_ok():
            comparison, flags = tyro.cli(Comparison, prog="python -m launch.local", args=argv, return_unknown_args=True)
        _check(comparison, flags)
        flags += _synthetic_if_there_is_no_data(_job(comparison, comparison.models[0], comparison.seeds[0], flags).cfg)
        runs = [(model, seed) for model in comparison.models for seed in comparison.seeds]
        configs = [_job(comparison, *run, flags).cfg for run in runs]
        refuse_twins(configs)
        group = shared_group(configs)
        flags += ["--wandb-group", group] if group else []
        jobs = [_job(comparison, *run, flags) for run in runs]
        first = jobs[0].cfg
        dataset = data.load(first.dataset, first.data_dir)
        jobs = [_reuse_or_retrain(job, provenance.made_by(job.cfg, dataset.md5)) for job in jobs]
        for folder in (job.folder for job in jobs if job.reused):
            say(f"{folder}: finished before, with the same settings, code and versions: taken as it is")
        todo = [job for job in jobs if not job.reused]
        sizes = dataset.image_shape, len(dataset.classes), len(dataset.train_labels)
        share = announce_apart(comparison.jobs, comparison.ranks, first, [job.cfg for job in todo], sizes)
        if "--check-only" in flags:
            return 0
    except UserError as error:
        fail(error, 2)
    except TrainingFailed as error:
        fail(error, 1)
    code = pool.train(todo, share) if comparison.jobs > 1 else one_after_another(todo, share.ranks)
    if code not in (0, 1):
        return code
    say("")
    if folders := [str(job.folder) for job in jobs if job.folder.exists()]:  # of none, compare would look elsewhere
        compare.main([*folders, "--out", str(comparison.out)])
    return code


def _check(comparison: Comparison, flags: list[str]) -> None:
    """What tyro leaves to us: ranges, and flags that neither we nor fashion_ddp.train know."""
    if comparison.ranks < 0:
        raise UserError(f"ranks must be at least 0, got {comparison.ranks}")
    if comparison.jobs < 1:
        raise UserError(f"jobs must be at least 1, got {comparison.jobs}")
    if not comparison.models or not comparison.seeds:
        raise UserError("models and seeds need at least one value each")
    check_flags(Comparison, flags, {})
    if not comparison.force and slurm.is_outside_of_a_job():
        words = ["--models", *comparison.models, "--recipe", comparison.recipe, "--seeds", *map(str, comparison.seeds)]
        words += ["--at-once", str(comparison.jobs)] if comparison.jobs > 1 else []
        raise UserError(
            "this is a machine of a SLURM cluster, and no job of it: submit these runs with "
            f"`python -m launch.submit {shlex.join([*words, *flags])}` (with cards: --gpus-per-node N), or train here "
            "all the same with --force (FORCE=1)"
        )


def _job(comparison: Comparison, model: str, seed: int, flags: list[str]) -> Job:
    argv = ["--model", model, "--recipe", comparison.recipe, "--seed", str(seed), *flags]
    return Job(cli.parse(argv).run, tuple(argv))


def _synthetic_if_there_is_no_data(cfg: Config) -> list[str]:
    """Flags to add: none, or synthetic data where neither files nor a network are there and none were named."""
    named = cfg.data_dir or os.environ.get("FASHION_DDP_DATA_DIR")
    if cfg.dataset not in data.PUBLISHED or named or data.locate(cfg.dataset, None):
        return []
    try:
        data.fetch(cfg.dataset)
        return []
    except UserError as error:
        line = "*" * 100
        say(f"{line}\nSYNTHETIC DATA: the real data could not be found or fetched, so this shows that the machine")
        say(f"works, and nothing about the models. {error}\n{line}")
        return ["--dataset", "synthetic"]


def _reuse_or_retrain(job: Job, made_by: dict) -> Job:
    """Whether the job's run is there already; where other code finished it, it is kept aside and made again."""
    if "--fresh" in job.argv:
        return job
    try:
        reuse = "--reuse" in job.argv
        return Job(job.cfg, job.argv, reused=claim.check(job.cfg, made_by, reuse=reuse) == "finished")
    except claim.Outdated:
        return Job(job.cfg, (*job.argv, "--fresh"))


def one_after_another(todo: list[Job], ranks: int) -> int:
    """Train runs, each on all that this machine has. Returns 0: all finished; 1: some failed, and the others went on;
    or what ended it before the last."""
    failed = 0
    for number, job in enumerate(todo, start=1):
        if told := signals.received():
            say(f"stopped ({told[0].name}) before run {number} of {len(todo)}: the same command continues")
            return os.EX_TEMPFAIL
        say(f"\n--- run {number} of {len(todo)}")
        code = Running(job.argv, ranks).wait()
        if code in (2, os.EX_TEMPFAIL, 128 + signal.SIGINT):
            return code
        failed += code != 0
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
