"""Bring run folders, and their report, to W&B: from a machine that has a network, for those that have none.

    python -m fashion_ddp.push runs --report report
    WANDB_MODE=offline python -m fashion_ddp.push runs/cnn-blog-seed42        into a file for `wandb sync`

A run is made there, or brought up to date: what its server has is not told again, so the same command may be given as
often as one likes. Runs that were made without W&B get a name for it in their summary.json. Exit code 1: some could not
be brought there, and the same command goes on. 2: nothing was, because something must be mended first.
"""

import dataclasses
import importlib.util
import json
import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from fashion_ddp import data
from fashion_ddp.config import Config, default_runs_dir, flags
from fashion_ddp.config.names import is_code
from fashion_ddp.console import entry_point, say
from fashion_ddp.errors import CommandFailed, TrainingFailed, UserError, counted
from fashion_ddp.files import write_whole
from fashion_ddp.redact import refuse_secrets
from fashion_ddp.runs import lock
from fashion_ddp.runs.folder import RunFolder
from fashion_ddp.runs.reading import Run, find_runs, read_run
from fashion_ddp.tracking.mirror import Wandb, panels

NAME = "wandb.json"  # in a report's folder: the name that W&B knows it by


@dataclass(frozen=True)
class Command:
    """Bring run folders, and their report, to Weights & Biases."""

    runs: flags.Positional[tuple[Path, ...]] = field(default_factory=lambda: (default_runs_dir(),))
    """Run folders, or folders of run folders."""
    report: Path | None = None
    """Folder of a report, as fashion_ddp.compare writes it; it becomes a run of the type report."""
    project: str | None = None
    """W&B project, instead of the one in each run's settings."""
    entity: str | None = None
    """User or team that owns the project, instead of the one in each run's settings."""
    group: str | None = None
    """Group of all these runs, instead of those in their settings."""
    tags: str | None = None
    """Tags, as first,second, instead of those in each run's settings."""
    notes: str | None = None
    """Notes, instead of those in each run's settings."""
    weights: bool = False
    """Upload the weights as well."""
    saved_report: bool = False
    """With --report: also make a report of W&B's own kind about the group. Needs the package wandb-workspaces."""

    def over(self, cfg: Config) -> Config:
        """Return a run's settings with this command's settings for W&B."""
        said = {name: getattr(self, name) for name in ("project", "entity", "group", "tags", "notes")}
        said |= {"weights": True if self.weights else None}
        return dataclasses.replace(cfg, **{f"wandb_{name}": v for name, v in said.items() if v is not None})


class NotPushed(CommandFailed):
    """A run could not be brought to W&B; the text says why."""


@entry_point
def main(argv: list[str] | None = None) -> None:
    command = flags.parse(Command, "fashion_ddp.push", argv)
    refuse_secrets(dataclasses.asdict(command))
    done = 0
    try:
        runs = [run for folder in find_runs(list(command.runs)) if _can_be_pushed(run := read_run(folder))]
        configs = [command.over(run.settings()) for run in runs]
        report = command.report and read_report(command.report)
        _check_saved_report(command, _common(configs))
        for run, cfg in zip(runs, configs, strict=True):
            push(run, cfg)
            done += 1
        if command.report and report:
            push_report(command.report, report, command.over(_common(configs)), command.saved_report)
    except TrainingFailed as error:  # a run folder cannot be written
        raise UserError(str(error)) from None
    except NotPushed as error:
        raise NotPushed(f"{error}; {done} of {counted(len(runs), 'run')} done, and the same command goes on") from None
    say(f"pushed: {counted(done, 'run')}" + (f", and {command.report}" if command.report else ""))


def _can_be_pushed(run: Run) -> bool:
    why = f"is being trained ({holder})" if (holder := lock.holder(run.path)) else "has not been started"
    if holder or not run.summary:
        say(f"{run.path} {why}: left out")
    return bool(run.summary) and not holder


def push(run: Run, cfg: Config) -> None:
    """Make a run at W&B of a folder, or bring it up to date. Raises NotPushed."""
    if not (name := run.summary.get("wandb_id")):
        name = secrets.token_hex(4)
        _remember(run, name)  # before W&B is told of it
    finished = run.status == "finished"

    def tell(mirror: Wandb) -> None:
        mirror.start(run.steps, run.metrics)
        mirror.summarise(run.summary | {"wandb_id": name})
        if finished:
            mirror.show(_test_images(run))

    config = panels.config(cfg, run.summary, run.environment)
    _push(Wandb(run.path, cfg, name, config, upload=True), tell, None if finished else TrainingFailed(run.status))


def push_report(folder: Path, runs: list[dict[str, Any]], cfg: Config, saved: bool = False) -> None:
    """Make a run of type report at W&B, or bring it up to date: of `runs`, the objects in report.json; and, if it is
    to be `saved`, a report of W&B's own."""
    known = {"wandb_id": secrets.token_hex(4)} | _known_names(folder)
    write_whole(folder / NAME, json.dumps(known) + "\n")

    def tell(mirror: Wandb) -> None:
        mirror.start([], [])
        mirror.show_report(runs)

    config = {"runs": ", ".join(str(run["name"]) for run in runs)}
    mirror = Wandb(folder, cfg, known["wandb_id"], config, job="report", upload=True)
    _push(mirror, tell, None)
    if saved:
        try:
            from wandb_workspaces.reports import v2

            place = {"entity": mirror.run.entity, "project": mirror.run.project}
            report = panels.saved_report(v2, place, cfg.wandb_group or "", known.get("saved_report", ""))
        except Exception as error:  # noqa: BLE001 - whatever W&B has against it
            why = " ".join(str(error).split())[:200]
            raise NotPushed(f"W&B did not save the report ({type(error).__name__}: {why})") from None
        write_whole(folder / NAME, json.dumps(known | {"saved_report": report.id}) + "\n")
        say(f"W&B: report at {report.url}")


def _check_saved_report(command: Command, cfg: Config) -> None:
    if not command.saved_report:
        return
    if command.report is None:
        raise UserError("--saved-report goes with --report: name the report's folder, too")
    if not cfg.wandb_group:
        raise UserError("--saved-report is on the runs of one group, and these have none in common: give --group")
    if importlib.util.find_spec("wandb_workspaces") is None:
        raise UserError("--saved-report needs a package that is not installed: pip install wandb-workspaces")


def _push(mirror: Wandb, tell: Callable[[Wandb], None], error: Exception | None) -> None:
    before = set(os.environ)
    tell(mirror)
    mirror.finish(error)
    for name in set(os.environ) - before:  # each run has its own folder to stage in
        del os.environ[name]
    if mirror.mode not in ("online", "offline"):
        raise NotPushed(f"{mirror.path} could not be brought to W&B")


def _remember(run: Run, name: str) -> None:
    try:
        held = lock.take(run.path)
        try:
            summary = json.loads((run.path / "summary.json").read_text())
            RunFolder(run.path, lock=held).write_json("summary.json", summary | {"wandb_id": name})
        finally:
            held.release()
    except OSError as error:
        raise UserError(
            f"{run.path}: its name at W&B cannot be noted there ({error.strerror}): make the folder writable"
        ) from None


def _known_names(folder: Path) -> dict[str, str]:
    try:
        return dict(json.loads((folder / NAME).read_text()))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{folder / NAME} cannot be used ({error}): remove it, which makes a new run at W&B") from None


def _common(configs: list[Config]) -> Config:
    """Settings whose W&B project, group and so on are those of all these runs; none where they differ."""
    cfg = configs[0] if configs else Config()
    names = [field.name for field in dataclasses.fields(cfg) if field.name.startswith("wandb_")]
    differ = [name for name in names if len({getattr(each, name) for each in configs}) > 1]
    return dataclasses.replace(cfg, **{name: getattr(Config, name) for name in differ})


def read_report(folder: Path) -> list[dict[str, Any]]:
    """The runs in a report. Raises UserError where there is none."""
    try:
        (folder / "report.html").stat()
        return json.loads((folder / "report.json").read_text())["runs"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder} holds no report ({error}): `python -m fashion_ddp.compare RUNS --out {folder}` writes one"
        ) from None


@cache
def _dataset(name: str, data_dir: Path | None) -> data.Dataset | None:
    try:
        return data.load(name, data_dir)
    except UserError:
        say(f"note: {name} is not on this machine: tables without images")
        return None


def _test_images(run: Run) -> np.ndarray | None:
    """The test set's, uint8 [n, C, H, W]; None where the run's own data is not here, or a function of the user's makes
    it: a run folder never decides which code is imported."""
    cfg, start = run.settings(), run.environment[-1] if run.environment else {}
    if is_code(cfg.dataset):
        return None
    dataset = _dataset(cfg.dataset, cfg.data_dir)
    return dataset.test_images if dataset and dataset.md5 == start.get("made_by", {}).get("data") else None


if __name__ == "__main__":
    main()
