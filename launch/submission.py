"""List the runs that a submission asks for: models x seeds x the points of a sweep, with validated settings."""

import itertools
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from fashion_ddp.config import Config, cli, field_types, layers
from fashion_ddp.config.flags import flag_names, refuse_unknown_flags
from fashion_ddp.errors import UserError, nearest
from fashion_ddp.report.text import common_settings
from fashion_ddp.runs import claim

TIME = re.compile(r"(?:(?:(\d+)-)?(\d+):([0-5]\d):([0-5]\d)|(\d+))")  # days, hours, minutes, seconds; or minutes alone
MEMORY = re.compile(r"([1-9]\d*)([KMGT]?)")  # as sbatch has it; without a letter these are megabytes
ON_CPU = "2G"  # a rank of the cnn took 0.91 GB, of linear 0.84, with the real data
# Flags of fashion_ddp.train that make no sense for many runs, and what to do instead.
REFUSED = {
    "model": "several runs are named with --models",
    "seed": "several runs are named with --seeds",
    "config": "models, recipe and seeds are chosen here: make a recipe of the file (--recipe mine.yaml), or train that "
    "one run with slurm/train.sbatch",
    "check_only": "--dry-run checks everything, and shows what would be submitted",
}


@dataclass(frozen=True)
class Submission:
    """Submit runs to SLURM, and their comparison. Further flags are those of fashion_ddp.train, for all runs."""

    models: tuple[str, ...] = ("linear", "relu", "mlp", "cnn")
    """Architectures to train."""
    recipe: str = "blog"
    """Set of training settings: blog, lab, fast, five_minutes, small, best, or the path of a YAML file."""
    seeds: tuple[int, ...] = (42,)
    """Each architecture is trained once per seed."""
    sweep: tuple[str, ...] = ()
    """Settings with several values, as lr=0.05,0.1: every combination is trained, and ranked by val/accuracy."""
    nodes: int = 1
    """Machines of each run."""
    gpus_per_node: int = 0
    """Cards of each machine, with one rank each; 0 trains on CPUs."""
    ranks_per_node: int = 0
    """Ranks of each machine: by default one per card, or one."""
    cpus_per_rank: int = 2
    """CPU cores of each rank, and its threads unless --threads gives another number."""
    mem_per_rank: str | None = None
    """Memory of each rank, as 4G or 800M. By default 2G on CPUs, where one of the cnn took 0.9, if neither --slurm nor
    the site file says anything of memory; on cards, what the cluster gives."""
    time: str = "60"
    """After which a job ends: minutes, HH:MM:SS or D-HH:MM:SS. Two minutes before, it gets a signal: it saves, and
    continues in a next job."""
    partition: str | None = None
    """SLURM's partition."""
    account: str | None = None
    """SLURM's account."""
    slurm: tuple[str, ...] = ()
    """Any other option of sbatch, as key=value, or a key alone: qos=long constraint=a100 exclusive."""
    site: Path | None = None
    """YAML file with what a group's jobs share (launch.templates writes one); $FASHION_DDP_SITE."""
    at_once: int = 4
    """How many runs may be trained at the same time."""
    max_restarts: int = 100
    """How often a job may start again before it is given up."""
    executor: Literal["slurm", "local", "debug"] = "slurm"
    """local: the same through Submitit on this machine, one run after another; debug: in this process."""
    out: Path = Path("report")
    """Folder of the report."""
    dry_run: bool = False
    """Check everything, print the runs' settings and the text for sbatch; submit nothing. Needs no SLURM."""
    wait: bool = False
    """Follow the runs until the report is written. Ctrl-C ends the following, not the jobs."""

    @property
    def ranks(self) -> int:
        """Ranks of each run on each machine."""
        return self.ranks_per_node or self.gpus_per_node or 1

    @property
    def minutes(self) -> int:
        """Minutes of a job, rounded up. Raises UserError for a time that is not written as SLURM has it."""
        found = TIME.fullmatch(self.time)
        if found is None:
            raise UserError(
                f"time: minutes, HH:MM:SS or D-HH:MM:SS, as in 90, 1:30:00 or 2-12:00:00; got {self.time!r}"
            )
        days, hours, minutes, seconds, alone = (int(part or 0) for part in found.groups())
        return alone + 60 * (24 * days + hours) + minutes + (seconds > 0)

    @property
    def memory(self) -> str | None:
        """Memory of a node, as sbatch takes it; None where the cluster decides."""
        asked = self.mem_per_rank or (None if self.gpus_per_node else ON_CPU)
        found = MEMORY.fullmatch(asked or "")
        return f"{int(found[1]) * self.ranks}{found[2] or 'M'}" if found else None

    def check(self) -> None:
        """Raise UserError for numbers out of range, and for options that do not go together."""
        if self.minutes < 1:
            raise UserError(f"time must be at least 1 minute, got {self.time}")
        if self.mem_per_rank is not None and not MEMORY.fullmatch(self.mem_per_rank):
            raise UserError(f"mem_per_rank: a number with K, M, G or T, as in 4G; got {self.mem_per_rank!r}")
        for name in ("nodes", "cpus_per_rank", "at_once"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("gpus_per_node", "ranks_per_node", "max_restarts"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} must be at least 0, got {getattr(self, name)}")
        if not self.models or not self.seeds:
            raise UserError("models and seeds need at least one value each")
        if self.gpus_per_node and self.ranks != self.gpus_per_node:
            raise UserError(
                f"ranks_per_node={self.ranks_per_node} with gpus_per_node={self.gpus_per_node}: a rank has one card"
            )
        if self.executor != "slurm" and self.nodes > 1:
            raise UserError(f"--executor {self.executor} uses this machine only: leave --nodes out")
        if self.executor == "debug" and self.ranks > 1:
            raise UserError(f"--executor debug trains one rank, in this process, not {self.ranks}: use local")


def commands(asked: Submission, flags: list[str], defaults: list[str]) -> list[cli.Command]:
    """Return the command line of every run, its settings validated.

    `flags`: of fashion_ddp.train, as the user gave them; they win over `defaults`. Raises UserError for a mistake in
    any of them.
    """
    asked.check()
    check_flags(Submission, flags, REFUSED)
    points = _sweep_points(asked.sweep, flags)
    usual = ["--device", "cuda" if asked.gpus_per_node else "cpu"]
    if asked.executor == "slurm":  # on its machine, a job could only guess the number
        usual += ["--threads", str(asked.cpus_per_rank)]
    runs = [
        cli.parse(["--model", model, "--recipe", asked.recipe, "--seed", str(seed), *usual, *defaults, *flags, *point])
        for model in asked.models
        for seed in asked.seeds
        for point in points
    ]
    configs = [command.run for command in runs]
    refuse_duplicates(configs)
    if asked.sweep and not all(cfg.validation for cfg in configs):
        raise UserError(
            "--sweep chooses among runs, and must not do so by the test set: hold out training images, as with "
            "--validation 5000"
        )
    ranks = asked.nodes * asked.ranks
    for cfg in configs:
        if asked.gpus_per_node and cfg.device == "cpu":
            raise UserError(f"--device cpu with gpus_per_node={asked.gpus_per_node}: leave one out")
        if cfg.reduction_shards % ranks:
            raise UserError(f"reduction_shards={cfg.reduction_shards} must be a multiple of the {ranks} ranks")
    if group := common_wandb_group(configs):
        runs = [replace(one, run=replace(one.run, wandb_group=group)) for one in runs]
    return runs


def refuse_duplicates(configs: list[Config]) -> None:
    """Raise UserError where two runs would have the same folder."""
    if len(configs) > 1 and configs[0].run_dir is not None:
        raise UserError(f"--run-dir names one folder, and these are {len(configs)} runs: give --runs-dir")
    names = [claim.folder_of(cfg) for cfg in configs]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"two of the runs would have the same folder, {twice}: name each model, seed and value once")


def common_wandb_group(configs: list[Config]) -> str | None:
    """Name a W&B group for runs that will be compared: the recipe, and the changes to it that they have in common.

    The name is the same at every start. None where a flag or W&B's own variable names the group.
    """
    if any(cfg.wandb_group for cfg in configs) or "WANDB_RUN_GROUP" in os.environ:
        return None
    common = common_settings([layers.recipe_changes(cfg) for cfg in configs])
    return "-".join([Path(configs[0].recipe).stem, *(f"{name}{value}" for name, value in common.items())])


def check_flags(cls: type, words: list[str], refused: Mapping[str, str]) -> None:
    """Raise UserError for a flag among the words that neither a command (the dataclass `cls`) nor fashion_ddp.train
    has, and for one that makes no sense for many runs (`refused`: what to do instead, by the name of the setting)."""
    for flag in (word.partition("=")[0] for word in words if word.startswith("--")):
        if reason := refused.get(flag.removeprefix("--").replace("-", "_")):
            raise UserError(f"{flag} does not go with many runs: {reason}")
    of_runs = [flag for flag in flag_names(cli.Command) if flag.removeprefix("--").replace("-", "_") not in refused]
    refuse_unknown_flags(words, [*flag_names(cls), *of_runs])


def _sweep_points(texts: tuple[str, ...], flags: list[str]) -> list[list[str]]:
    """Return the flags of each point of a sweep; a single point without flags where there is no sweep.

    `texts`: one `name=value,value,...` per setting.
    """
    names = [*Config().result_settings(), "model_args", "init_from", "freeze"]
    given = {word.partition("=")[0].removeprefix("--").replace("-", "_").removeprefix("no_") for word in flags}
    axes: dict[str, list[str]] = {}
    for text in texts:
        name, equals, values = text.partition("=")
        name = name.replace("-", "_")
        if not equals or not all(values.split(",")):
            raise UserError(f"--sweep {text}: expected name=value,value,... as in lr=0.05,0.1")
        if name not in names:
            raise UserError(f"--sweep {text}: {name!r} is not a setting that changes a result; {nearest(name, names)}")
        if name in axes or name in given:
            raise UserError(f"--sweep {text}: {name} is given twice; name all its values once")
        axes[name] = [_flag(name, value) for value in values.split(",")]
    return [list(point) for point in itertools.product(*axes.values())]


def _flag(name: str, value: str) -> str:
    flag = name.replace("_", "-")
    if field_types()[name] is not bool:
        return f"--{flag}={value}"
    if value.lower() not in ("true", "false"):
        raise UserError(f"--sweep {name}: must be true or false, got {value!r}")
    return f"--{flag}" if value.lower() == "true" else f"--no-{flag}"
