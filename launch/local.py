"""Train many runs on this machine, and compare them. This is what `make compare` does.

The runs train one after another, each on the whole machine, or several at once.

    python -m launch.local --models linear relu mlp cnn --recipe blog --seeds 42
    python -m launch.local --models cnn --seeds 0 1 2 --epochs 10       further flags are those of fashion_ddp.train
    python -m launch.local --seeds 0 1 2 --jobs 4                       four at once, each on a card of its own

A run that finished before with the same settings, code and versions is not trained again. Exit code 0: all finished;
1: some failed, and the report says which; 2: nothing was started, because something must be corrected first; 75:
stopped, and the same command continues.
"""

import os
import shlex
import signal
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from fashion_ddp.distributed import signals

if __name__ == "__main__":
    signals.listen()  # before slow imports

from fashion_ddp import compare, data
from fashion_ddp.config import Config, cli, flags
from fashion_ddp.console import entry_point, say
from fashion_ddp.errors import UserError
from fashion_ddp.runs import claim, provenance
from launch import mps, pool, slurm
from launch.fork_server import COMPILER, ForkServer, Start
from launch.processes import LocalRanks, LocalRun
from launch.share import divide_in_subprocess
from launch.submission import check_flags, common_wandb_group, refuse_duplicates


@dataclass(frozen=True)
class Arguments:
    """Train many runs on this machine, and compare them. Further flags are those of fashion_ddp.train, for all runs."""

    models: tuple[str, ...] = ("linear", "relu", "mlp", "cnn")
    """Architectures to train."""
    recipe: str = "blog"
    """Set of training settings: blog, lab, fast, five_minutes, small, best, or the path of a YAML file."""
    seeds: tuple[int, ...] = (42,)
    """Each architecture is trained once per seed."""
    ranks: int = 0
    """Ranks of each run. 0 means the fastest: one per card; on a CPU, or with --jobs, one with its
    share of the cores."""
    jobs: int = 1
    """Runs at once. Each gets a card of its own (R cards with --ranks R) while there are enough, else runs share cards,
    by NVIDIA's MPS where it is installed; on a CPU each gets its share of the cores. The report marks their times,
    because runs that share a machine slow each other down."""
    out: Path = Path("report")
    """Folder of the report."""
    force: bool = False
    """Train even on a login node of a SLURM cluster."""


@entry_point
def main(argv: list[str] | None = None) -> int:
    comparison, others = flags.parse_known(Arguments, "launch.local", argv)
    _check(comparison, others)
    first = _local_run(comparison, comparison.models[0], comparison.seeds[0], others).cfg
    others += _synthetic_if_there_is_no_data(first)
    packages = [*([] if first.tracker == "none" else ["wandb"]), *(COMPILER if first.compile else [])]
    with ForkServer(packages) as server:  # it loads while this process looks at the runs
        return train_and_compare(comparison, others, server.start)


def train_and_compare(comparison: Arguments, others: list[str], start: Start) -> int:
    """Train what is to be trained, and write the report. Returns the exit code.

    `others`: flags of fashion_ddp.train for all runs. `start`: starts a process.
    """
    models_and_seeds = [(model, seed) for model in comparison.models for seed in comparison.seeds]
    configs = [_local_run(comparison, model, seed, others).cfg for model, seed in models_and_seeds]
    refuse_duplicates(configs)
    group = common_wandb_group(configs)
    others += ["--wandb-group", group] if group else []
    runs = [_local_run(comparison, model, seed, others) for model, seed in models_and_seeds]
    first = runs[0].cfg
    dataset = data.load_for(first)
    runs = [_reuse_or_retrain(run, provenance.made_by(run.cfg, dataset.md5)) for run in runs]
    for run in runs:
        if run.reused:
            say(f"{run.folder}: finished before, with the same settings, code and versions: taken as it is")
    todo = [run for run in runs if not run.reused]
    shape = dataset.image_shape, len(dataset.classes), len(dataset.train_labels)
    share = divide_in_subprocess(
        comparison.jobs, comparison.ranks, runs[0].argv, [run.argv for run in todo], shape, start
    )
    if "--check-only" in others:
        return 0
    if comparison.jobs > 1:
        with mps.running(needed=share.runs_per_card > 1) as variables:
            code = pool.train(todo, replace(share, variables=variables), start)
    else:
        code = one_after_another(todo, share.ranks, start)
    if code not in (0, 1):
        return code
    say("")
    # Without folders, compare would look for runs elsewhere.
    if folders := [str(run.folder) for run in runs if run.folder.exists()]:
        compare.main([*folders, "--out", str(comparison.out)])
    return code


def _check(comparison: Arguments, others: list[str]) -> None:
    """Raise UserError for numbers out of range, for unknown flags, and on a login node of a cluster."""
    if comparison.ranks < 0:
        raise UserError(f"ranks must be at least 0, got {comparison.ranks}")
    if comparison.jobs < 1:
        raise UserError(f"jobs must be at least 1, got {comparison.jobs}")
    if not comparison.models or not comparison.seeds:
        raise UserError("models and seeds need at least one value each")
    check_flags(Arguments, others, {})
    if not comparison.force and slurm.on_login_node():
        words = ["--models", *comparison.models, "--recipe", comparison.recipe, "--seeds", *map(str, comparison.seeds)]
        words += ["--at-once", str(comparison.jobs)] if comparison.jobs > 1 else []
        raise UserError(
            "this is a machine of a SLURM cluster, and this is not a job: submit these runs with "
            f"`python -m launch.submit {shlex.join([*words, *others])}` (with cards: --gpus-per-node N), or train here "
            "all the same with --force (FORCE=1)"
        )


def _local_run(comparison: Arguments, model: str, seed: int, others: list[str]) -> LocalRun:
    argv = ["--model", model, "--recipe", comparison.recipe, "--seed", str(seed), *others]
    return LocalRun(cli.parse(argv).run, tuple(argv))


def _synthetic_if_there_is_no_data(cfg: Config) -> list[str]:
    """Return flags for synthetic data where the data was not named, is not here and cannot be downloaded; else []."""
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


def _reuse_or_retrain(run: LocalRun, made_by: dict) -> LocalRun:
    """Mark the run as reused where it is finished. Where other code finished it, train it anew beside the old one."""
    if "--fresh" in run.argv:
        return run
    try:
        reuse = "--reuse" in run.argv
        return replace(run, reused=claim.check(run.cfg, made_by, reuse=reuse) == "finished")
    except claim.Outdated:
        return replace(run, argv=(*run.argv, "--fresh"))


def one_after_another(todo: list[LocalRun], ranks: int, start: Start) -> int:
    """Train runs, each on the whole machine. `start` starts a rank.

    Returns 0 where all finished; 1 where some failed (the others are trained all the same); else the exit code of the
    run after which no other is started: of a mistake, or of a stop.
    """
    failed = 0
    for number, run in enumerate(todo, start=1):
        if received := signals.received():
            say(f"stopped ({received[0].name}) before run {number} of {len(todo)}: the same command continues")
            return os.EX_TEMPFAIL
        say(f"\n--- run {number} of {len(todo)}")
        code = LocalRanks(run.argv, ranks, start=start).wait()
        if code in (2, os.EX_TEMPFAIL, 128 + signal.SIGINT):
            return code
        failed += code != 0
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
