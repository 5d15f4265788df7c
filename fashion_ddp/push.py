"""Upload run folders, and their report, to W&B, for example for machines that have no network.

    python -m fashion_ddp.push runs --report report
    python -m fashion_ddp.push runs --watch                                   while they are being trained elsewhere
    WANDB_MODE=offline python -m fashion_ddp.push runs/cnn-blog-seed42        into a file for `wandb sync`

It creates a run at W&B or updates it. It sends nothing that the server already has, so the command may be repeated.
Exit code 1: some runs could not be uploaded, and the same command goes on. 2: nothing was uploaded, because the user
must fix something first. 75: a watch was stopped, and the same command goes on.
"""

import dataclasses
import importlib.util
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fashion_ddp.config import Config, default_runs_dir, flags
from fashion_ddp.console import entry_point, say
from fashion_ddp.errors import TrainingFailed, UserError, pluralize
from fashion_ddp.redact import refuse_secrets
from fashion_ddp.runs.reading import Run, find_runs, load_run
from fashion_ddp.tracking.upload import NotPushed, push, push_report, why_left_out
from fashion_ddp.tracking.watch import Watch


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

    watch: bool = False
    """Stay, and bring what runs write while they are being trained, also those that begin later, until all have
    ended."""

    def settings(self) -> dict[str, Any]:
        """Return this command's settings for W&B, which win over a run's own."""
        said = {name: getattr(self, name) for name in ("project", "entity", "group", "tags", "notes")}
        said |= {"weights": True if self.weights else None}
        return {f"wandb_{name}": value for name, value in said.items() if value is not None}


@entry_point
def main(argv: list[str] | None = None) -> None:
    arguments = flags.parse(Arguments, "fashion_ddp.push", argv)
    refuse_secrets(dataclasses.asdict(arguments))
    if arguments.watch:
        _check_watch(arguments)
        done = Watch(arguments.runs, arguments.settings()).run()
    else:
        done = push_all(arguments)
    say(f"pushed: {pluralize(done, 'run')}" + (f", and {arguments.report}" if arguments.report else ""))


def push_all(arguments: Arguments) -> int:
    """Bring the runs that are not being trained to W&B, and the report. Returns the number of runs."""
    done, settings = 0, arguments.settings()
    try:
        runs = [run for folder in find_runs(list(arguments.runs)) if _can_be_pushed(run := load_run(folder))]
        configs = [dataclasses.replace(run.settings(), **settings) for run in runs]
        report = arguments.report and read_report(arguments.report)
        _check_saved_report(arguments, _common(configs))
        for run in runs:
            push(run.path, settings)
            done += 1
        if arguments.report and report:
            cfg = dataclasses.replace(_common(configs), **settings)
            push_report(arguments.report, report, cfg, arguments.saved_report)
    except TrainingFailed as error:  # a run folder cannot be written
        raise UserError(str(error)) from None
    except NotPushed as error:
        so_far = f"{done} of {pluralize(len(runs), 'run')} done"
        raise NotPushed(f"{error}; {so_far}, and the same command goes on") from None
    return done


def _can_be_pushed(run: Run) -> bool:
    if why := why_left_out(run):
        say(f"{run.path} {why}: left out")
    return not why


def _check_watch(arguments: Arguments) -> None:
    if arguments.report or arguments.saved_report:
        raise UserError("--watch brings runs, and --report what was made of them: push the report afterwards")
    if (mode := os.environ.get("WANDB_MODE", "online")) != "online":
        raise UserError(f"--watch needs W&B's server, which WANDB_MODE={mode} keeps away from: give WANDB_MODE=online")


def _check_saved_report(arguments: Arguments, cfg: Config) -> None:
    if not arguments.saved_report:
        return
    if arguments.report is None:
        raise UserError("--saved-report goes with --report: name the report's folder, too")
    if not cfg.wandb_group:
        raise UserError("--saved-report shows the runs of one group, and these have none in common: give --group")
    if importlib.util.find_spec("wandb_workspaces") is None:
        raise UserError("--saved-report needs a package that is not installed: pip install wandb-workspaces")


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


if __name__ == "__main__":
    main()
