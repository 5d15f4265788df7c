"""Upload run folders, and their report, to W&B, for example for machines that have no network.

    python -m fashion_ddp.push runs --report report
    WANDB_MODE=offline python -m fashion_ddp.push runs/cnn-blog-seed42        into a file for `wandb sync`

It creates a run at W&B or updates it. It sends nothing that the server already has, so the command may be repeated. A
run that was made without W&B gets an id for it in its summary.json. Exit code 1: some runs could not be uploaded, and
the same command goes on. 2: nothing was uploaded, because the user must fix something first.
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
from fashion_ddp.data.cache import PictureSettings
from fashion_ddp.errors import CommandFailed, TrainingFailed, UserError, pluralize
from fashion_ddp.files import write_whole
from fashion_ddp.redact import refuse_secrets
from fashion_ddp.runs import lock
from fashion_ddp.runs.folder import RunFolder
from fashion_ddp.runs.reading import Run, find_runs, load_run
from fashion_ddp.tracking.mirror import WandbMirror, panels

IDS_FILE = "wandb.json"  # in a report's folder: its ids at W&B


@dataclass(frozen=True)
class Arguments:
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
    """A run could not be uploaded to W&B, and the text says why."""


@entry_point
def main(argv: list[str] | None = None) -> None:
    arguments = flags.parse(Arguments, "fashion_ddp.push", argv)
    refuse_secrets(dataclasses.asdict(arguments))
    done = 0
    try:
        runs = [run for folder in find_runs(list(arguments.runs)) if _can_be_pushed(run := load_run(folder))]
        configs = [arguments.over(run.settings()) for run in runs]
        report = arguments.report and read_report(arguments.report)
        _check_saved_report(arguments, _common(configs))
        for run, cfg in zip(runs, configs, strict=True):
            push(run, cfg)
            done += 1
        if arguments.report and report:
            push_report(arguments.report, report, arguments.over(_common(configs)), arguments.saved_report)
    except TrainingFailed as error:  # a run folder cannot be written
        raise UserError(str(error)) from None
    except NotPushed as error:
        so_far = f"{done} of {pluralize(len(runs), 'run')} done"
        raise NotPushed(f"{error}; {so_far}, and the same command goes on") from None
    say(f"pushed: {pluralize(done, 'run')}" + (f", and {arguments.report}" if arguments.report else ""))


def _can_be_pushed(run: Run) -> bool:
    why = f"is being trained ({holder})" if (holder := lock.holder(run.path)) else "has not been started"
    if holder or not run.summary:
        say(f"{run.path} {why}: left out")
    return bool(run.summary) and not holder


def push(run: Run, cfg: Config) -> None:
    """Create or update a run at W&B from a run folder. Raises NotPushed where that fails."""
    if not (wandb_id := run.summary.get("wandb_id")):
        wandb_id = secrets.token_hex(4)
        _save_wandb_id(run, wandb_id)  # before W&B gets it
    finished = run.status == "finished"

    def log(mirror: WandbMirror) -> None:
        mirror.start(run.steps, run.metrics)
        mirror.update_summary(run.summary | {"wandb_id": wandb_id})
        if finished:
            mirror.show_results(_test_images(run))

    config = panels.run_config(cfg, run.summary, run.environment)
    mirror = WandbMirror(run.path, cfg, wandb_id, config, upload=True)
    _push(mirror, log, None if finished else TrainingFailed(run.status))


def push_report(folder: Path, runs: list[dict[str, Any]], cfg: Config, saved: bool = False) -> None:
    """Create or update a run of type report at W&B from the objects in report.json, `runs`.

    `saved`: also save a report of W&B's own. Raises NotPushed where one of them fails.
    """
    ids = {"wandb_id": secrets.token_hex(4)} | _read_wandb_ids(folder)
    write_whole(folder / IDS_FILE, json.dumps(ids) + "\n")

    def log(mirror: WandbMirror) -> None:
        mirror.start([], [])
        mirror.show_report(runs)

    config = {"runs": ", ".join(str(run["name"]) for run in runs)}
    mirror = WandbMirror(folder, cfg, ids["wandb_id"], config, job_type="report", upload=True)
    _push(mirror, log, None)
    if saved:
        try:
            from wandb_workspaces.reports import v2

            project = {"entity": mirror.run.entity, "project": mirror.run.project}
            report = panels.save_report(v2, project, cfg.wandb_group or "", ids.get("saved_report", ""))
        except Exception as error:  # noqa: BLE001 - W&B may raise anything
            why = " ".join(str(error).split())[:200]
            raise NotPushed(f"W&B did not save the report ({type(error).__name__}: {why})") from None
        write_whole(folder / IDS_FILE, json.dumps(ids | {"saved_report": report.id}) + "\n")
        say(f"W&B: report at {report.url}")


def _check_saved_report(arguments: Arguments, cfg: Config) -> None:
    if not arguments.saved_report:
        return
    if arguments.report is None:
        raise UserError("--saved-report goes with --report: name the report's folder, too")
    if not cfg.wandb_group:
        raise UserError("--saved-report shows the runs of one group, and these have none in common: give --group")
    if importlib.util.find_spec("wandb_workspaces") is None:
        raise UserError("--saved-report needs a package that is not installed: pip install wandb-workspaces")


def _push(mirror: WandbMirror, log: Callable[[WandbMirror], None], error: Exception | None) -> None:
    before = set(os.environ)
    log(mirror)
    mirror.finish(error)
    for name in set(os.environ) - before:  # the mirror set W&B's folders for this run: the next one has others
        del os.environ[name]
    if mirror.mode not in ("online", "offline"):
        raise NotPushed(f"{mirror.path} could not be brought to W&B")


def _save_wandb_id(run: Run, wandb_id: str) -> None:
    try:
        own_lock = lock.acquire(run.path)
        try:
            summary = json.loads((run.path / "summary.json").read_text())
            RunFolder(run.path, lock=own_lock).write_json("summary.json", summary | {"wandb_id": wandb_id})
        finally:
            own_lock.release()
    except OSError as error:
        raise UserError(
            f"{run.path}: its id at W&B cannot be saved there ({error.strerror}): make the folder writable"
        ) from None


def _read_wandb_ids(folder: Path) -> dict[str, str]:
    try:
        return dict(json.loads((folder / IDS_FILE).read_text()))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{folder / IDS_FILE} cannot be used ({error}): remove it, which makes a new run at W&B"
        ) from None


def _common(configs: list[Config]) -> Config:
    """Return settings with the W&B project, group and so on that all runs have in common; the default where they
    differ."""
    cfg = configs[0] if configs else Config()
    names = [field.name for field in dataclasses.fields(cfg) if field.name.startswith("wandb_")]
    differ = [name for name in names if len({getattr(each, name) for each in configs}) > 1]
    return dataclasses.replace(cfg, **{name: getattr(Config, name) for name in differ})


def read_report(folder: Path) -> list[dict[str, Any]]:
    """Return the objects of the runs in a report. Raises UserError where there is no report."""
    try:
        (folder / "report.html").stat()
        return json.loads((folder / "report.json").read_text())["runs"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder} holds no report ({error}): `python -m fashion_ddp.compare RUNS --out {folder}` writes one"
        ) from None


@cache
def _dataset(name: str, data_dir: Path | None, pictures: PictureSettings) -> data.Dataset | None:
    try:
        return data.load(name, data_dir, pictures)
    except UserError:
        say(f"note: {name} is not on this machine: tables without images")
        return None


def _test_images(run: Run) -> np.ndarray | None:
    """Return the test set's images, uint8 [n, C, H, W].

    None where the run's data is not on this machine, or a function of the user's own makes it: a run folder never
    decides which code is imported.
    """
    cfg, start = run.settings(), run.environment[-1] if run.environment else {}
    if is_code(cfg.dataset):
        return None
    dataset = _dataset(cfg.dataset, cfg.data_dir, data.picture_settings(cfg))
    return dataset.test_images if dataset and dataset.md5 == start.get("made_by", {}).get("data") else None


if __name__ == "__main__":
    main()
