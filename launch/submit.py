"""Submit runs to SLURM: models x seeds x a sweep as one job array, and the comparison as a job that follows it.

    python -m launch.submit --models linear relu cnn --seeds 0 1 2 --nodes 1 --gpus-per-node 4
    python -m launch.submit --models cnn --sweep lr=0.05,0.1 --validation 5000 --partition gpu --time 60
    python -m launch.submit --models cnn --gpus-per-node 4 --dry-run      shows what would be submitted; needs no SLURM

Further flags are those of fashion_ddp.train, for every run. One task per rank. Everything is validated before anything
is queued. A finished run of the same settings, code and versions is taken as it is, and one that was begun continues.

Exit code 0: submitted. 2: nothing was, because something must be mended first. With --executor local or debug, and
with --wait, 1: some run is not finished, and the report says which. 75: stopped here, and the same command continues.
"""

import dataclasses
import json
import os
import shlex
import shutil
import sys
import time
import uuid
from pathlib import Path
from typing import Any

from fashion_ddp import data
from fashion_ddp.config import Config, flags, layers
from fashion_ddp.config.cli import Command
from fashion_ddp.config.names import is_code, is_path
from fashion_ddp.console import entry_point, say
from fashion_ddp.data.published import chosen_folder
from fashion_ddp.errors import UserError, pluralize
from fashion_ddp.files import write_whole
from fashion_ddp.runs import claim, lock, provenance
from fashion_ddp.runs.reading import load_run
from launch import jobs, sbatch, site, slurm, snapshot, submission, submitit_local
from launch.job import Report
from launch.submission import Submission

RECORD = "submission.json"  # in a submission's folder: all that is needed to submit its runs again


@entry_point
def main(argv: list[str] | None = None) -> int:
    asked, others = flags.parse_known(Submission, "launch.submit", argv)
    try:
        return _submit(asked, others)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted: nothing is queued by this command") from None


def _submit(asked: Submission, others: list[str]) -> int:
    group = site.read(asked.site)
    commands = [
        dataclasses.replace(command, run=_absolute(command.run))
        for command in submission.commands(asked, others, group.flags())
    ]
    asked = dataclasses.replace(asked, out=asked.out.absolute())
    every = [claim.folder_of(command.run) for command in commands]
    base = every[0].parent / ".submissions" / f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:4]}"
    plan = sbatch.Plan(asked, group, base, base / "code", reuse=commands[0].reuse)
    cards = asked.gpus_per_node or any(name.startswith(("gres", "gpu")) for name in plan.options())
    if not cards and any(command.run.device == "cuda" for command in commands):
        raise UserError("--device cuda, and no cards are asked for: give --gpus-per-node")
    _check_out(asked.out)
    md5 = _check_data_and_models([command.run for command in commands], asked.dry_run)
    seen = {one.folder: one for one in jobs.look(every)}
    todo = [command for command in commands if _is_to_do(command, seen.get(claim.folder_of(command.run)), group, md5)]
    if asked.dry_run:
        _show(plan, [command.run for command in todo])
        return 0
    if asked.executor == "slurm":
        if not todo:
            say(f"all are finished: `python -m fashion_ddp.compare {shlex.quote(str(every[0].parent))}` compares them")
            return 0
        _ask_slurm(plan, len(todo), [every[0].parent, *(command.run.data_dir for command in commands[:1])])
    new = [folder for command in todo if not (folder := claim.folder_of(command.run)).exists()]
    for command in todo:
        held = claim.claim(command.run, _made_by(command.run, group, md5), command.fresh, command.reuse)
        if held.lock is not None:
            held.lock.release()
    try:
        return _send(plan, [claim.folder_of(command.run) for command in todo], every)
    except sbatch.NotQueued:
        for folder in (*new, base):
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _absolute(cfg: Config) -> Config:
    """The run as it is from any folder. What is named by a variable of this shell is named in the settings."""
    paths: dict[str, Any] = {"runs_dir": cfg.runs_dir, "run_dir": cfg.run_dir, "data_dir": chosen_folder(cfg.data_dir)}
    found: dict[str, Any] = {name: path.absolute() for name, path in paths.items() if path is not None}
    if cfg.recipe not in layers.recipe_names():
        found["recipe"] = os.path.abspath(cfg.recipe)
    if cfg.init_from not in (None, "imagenet"):
        found["init_from"] = os.path.abspath(str(cfg.init_from))
    if is_path(cfg.dataset):
        found["dataset"] = os.path.abspath(cfg.dataset)
    return dataclasses.replace(cfg, **found)


def _check_out(out: Path) -> None:
    there = next(folder for folder in (out, *out.parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(f"--out {out}: {there} is no folder that can be written: choose another one")


def _check_data_and_models(configs: list[Config], dry_run: bool) -> dict[str, dict[str, str]]:
    """What the jobs would find too late: data that is missing or damaged, a user's model that does not fit.

    Returns the md5 of each dataset that is here.
    """
    found = {}
    for dataset, folder in {(cfg.dataset, cfg.data_dir) for cfg in configs}:
        if dataset in data.PUBLISHED and data.locate(dataset, folder) is None:
            if dry_run:
                say(f"note: {dataset} is not on this machine")
                return {}
            if folder is None:
                data.fetch(dataset)
        loaded = data.load(dataset, folder)
        found[dataset] = loaded.md5
    snapshot.users_code([name for cfg in configs for name in (cfg.model, cfg.dataset)])
    kinds = {(cfg.model, cfg.model_args, cfg.init_from, cfg.freeze): cfg for cfg in configs}
    for cfg in (cfg for cfg in kinds.values() if is_code(cfg.model) or cfg.init_from or cfg.freeze):
        from fashion_ddp.models import architectures, transfer  # import torch

        transfer.prepare(cfg, architectures.build(cfg, loaded.image_shape, len(loaded.classes)))
    return found


def _is_to_do(command: Command, seen: jobs.Seen | None, group: site.Site, md5: dict[str, dict[str, str]]) -> bool:
    """Whether a run is to be submitted; not, if it is finished. Raises UserError where it is queued or running, or
    the folder is another run's, or it was made by other code or versions."""
    folder = claim.folder_of(command.run)
    if seen and seen.unknown:
        raise UserError(f"{folder}: whether its job {seen.job} is still queued cannot be told: {seen.unknown}")
    if seen and seen.active:
        by = f"job {seen.job}" if seen.queued else lock.holder(folder) or f"process {seen.job}"
        cancel = f"python -m launch.status cancel {shlex.quote(str(folder))}"
        raise UserError(f"{folder} is {seen.state} ({by}): wait for it, or `{cancel}`")
    if claim.check(command.run, _made_by(command.run, group, md5), command.fresh, command.reuse) == "finished":
        say(f"{folder}: finished before, with the same settings, code and versions: taken as it is")
        return False
    return True


def _made_by(cfg: Config, group: site.Site, md5: dict[str, dict[str, str]]) -> dict[str, Any]:
    """What a job of ours would record as its code, versions and data. A Python that is not this one has the versions
    that a run which is there already had, and a dataset that is not here that run's md5."""
    folder = claim.folder_of(cfg)
    starts = load_run(folder).environment if (folder / "config.yaml").is_file() else []
    before = starts[-1].get("made_by", {}) if starts else {}
    now = provenance.made_by(cfg, md5.get(cfg.dataset, before.get("data", {})))
    others = {name: value for name, value in now.items() if name not in provenance.versions()}
    return before | others if group.python and before else now


def _ask_slurm(plan: sbatch.Plan, count: int, folders: list[Path | None]) -> None:
    sbatch.check(plan, count)
    if own := sbatch.not_shared([folder for folder in (*folders, Path(sys.prefix)) if folder]):
        say(f"warning: {', '.join(own)}: file systems that other machines do not see, as it seems")


def _show(plan: sbatch.Plan, configs: list[Config]) -> None:
    for cfg in configs:
        say(f"--- {claim.folder_of(cfg)}\n{cfg.to_yaml()}")
    if plan.asked.executor != "slurm" or not configs:
        return
    say(f"--- sbatch, for {pluralize(len(configs), 'run')}\n{plan.text(len(configs))}")
    say(f"--- sbatch, for the comparison\n{plan.report_text()}")
    if slurm.answers():
        say(f"--- SLURM here would take them: {sbatch.check(plan, len(configs))}")


def _send(plan: sbatch.Plan, todo: list[Path], every: list[Path]) -> int:
    """Submit the runs in the folders `todo`, and the comparison of every run. The runs' folders are prepared."""
    asked = plan.asked
    try:
        plan.base.mkdir(parents=True)
        if not plan.code.exists() and asked.executor != "debug":
            configs = [load_run(folder).settings() for folder in todo]
            snapshot.take(plan.code, [name for cfg in configs for name in (cfg.model, cfg.dataset)])
        write_whole(plan.base / RECORD, json.dumps(_record(plan, every), indent=1, default=str) + "\n")
    except OSError as error:
        raise sbatch.NotQueued(f"{plan.base}: cannot be written ({error}): choose another --runs-dir") from None
    report = Report(tuple(map(str, every)), str(asked.out), bool(asked.sweep))
    if asked.executor != "slurm":
        return submitit_local.run_all(plan, todo, report)
    ids, last = sbatch.submit(plan, todo, report)
    for folder, job in zip(todo, ids, strict=True):
        say(f"job {job}  {folder}")
    say(f"{pluralize(len(todo), 'run')} submitted; job {last} compares them when all have ended, into {asked.out}")
    say(f"next: python -m launch.status {shlex.quote(str(todo[0].parent))}")
    if not asked.wait:
        return 0
    try:
        return int(not jobs.follow(every, last))
    except KeyboardInterrupt:
        say("no longer followed; the jobs go on")
        return 130


def _record(plan: sbatch.Plan, every: list[Path]) -> dict[str, Any]:
    asked = dataclasses.asdict(plan.asked) | {"wait": False, "site": None}
    kept = {"command": sys.argv, "asked": asked, "site": dataclasses.asdict(plan.site), "runs": every}
    return kept | {"code": plan.code, "cwd": plan.cwd, "reuse": plan.reuse}


def again(folders: list[Path], submission: Path) -> int:
    """Submit runs once more, as they were, with the code that they were submitted with."""
    path = submission / RECORD
    try:
        record = json.loads(path.read_text())
        given: Any = {name: tuple(v) if isinstance(v, list) else v for name, v in record["asked"].items()}
        asked = Submission(**given | {"out": Path(given["out"])})
        group = site.Site(**record["site"] | {"setup": tuple(record["site"]["setup"])})
        base = submission.with_name(f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:4]}")
        plan = sbatch.Plan(asked, group, base, Path(record["code"]), Path(record["cwd"]), record["reuse"])
        every = [Path(run) for run in record["runs"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be used ({error}): submit these runs anew, with launch.submit") from None
    if not plan.code.is_dir() and asked.executor != "debug":
        raise UserError(f"the code that these runs were submitted with is gone from {plan.code}: submit them anew")
    if asked.executor == "slurm":
        _ask_slurm(plan, len(folders), [submission])
    return _send(plan, folders, every)


if __name__ == "__main__":
    sys.exit(main())
