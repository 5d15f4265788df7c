"""Bring a run folder, or a report, to W&B. One process at a time does so, behind a lock in the folder's `wandb/`."""

import contextlib
import dataclasses
import json
import os
import secrets
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from fashion_ddp import data
from fashion_ddp.config import Config
from fashion_ddp.config.names import is_code
from fashion_ddp.console import say
from fashion_ddp.data.cache import PictureSettings
from fashion_ddp.errors import CommandFailed, UserError
from fashion_ddp.files import write_whole
from fashion_ddp.runs import lock
from fashion_ddp.runs.folder import RunFolder
from fashion_ddp.runs.reading import Run, load_run
from fashion_ddp.tracking.mirror import FOLDER, WandbMirror, panels

IDS_FILE = "wandb.json"  # in a report's folder: its ids at W&B


class NotPushed(CommandFailed):
    """A run could not be uploaded to W&B, and the text says why."""


class _Unfinished(Exception):
    """The run ended before it was finished."""


def push(folder: Path, settings: dict[str, Any], readings: Iterable[Run] | None = None) -> dict[str, Any]:
    """Create or update a run at W&B from a run folder. Returns the summary that was told last.

    `settings` win over the run's own. `readings`: what is found in the folder of a run that is being trained, again and
    again until that has ended.

    Raises NotPushed where the run is left to another process, or W&B fails; what `readings` raise; UserError.
    """
    with _locked(folder) as own_lock:
        run = load_run(folder)
        if why := _why_not_now(run, watching=readings is not None):
            raise NotPushed(f"{folder} {why}")
        wandb_id = run.summary.get("wandb_id") or _new_wandb_id(run)  # in the folder before W&B gets it
        cfg = dataclasses.replace(run.settings(), **settings)
        config = panels.run_config(cfg, run.summary, run.environment)
        mirror = WandbMirror(folder, cfg, wandb_id, config, upload=True)
        with _finished(mirror):
            mirror.start(run.summary | {"wandb_id": wandb_id}, run.steps, run.metrics)
            for run in readings or ():
                own_lock.check()
                if mirror.failed:
                    break
                mirror.update_summary(run.summary)
                mirror.log(run.steps, run.metrics)
            mirror.update_summary(run.summary | {"wandb_id": wandb_id})  # last: rows hold some of its names, too
            if run.status != "finished":
                raise _Unfinished(run.status)
            mirror.show_results(_test_images(run))
    return run.summary | {"wandb_id": wandb_id}


def push_report(folder: Path, runs: list[dict[str, Any]], cfg: Config, saved: bool = False) -> None:
    """Create or update a run of type report at W&B from the objects in report.json, `runs`.

    `saved`: also save a report of W&B's own. Raises NotPushed where one of them fails.
    """
    ids = {"wandb_id": secrets.token_hex(4)} | _read_wandb_ids(folder)
    write_whole(folder / IDS_FILE, json.dumps(ids) + "\n")
    config = {"runs": ", ".join(str(run["name"]) for run in runs)}
    mirror = WandbMirror(folder, cfg, ids["wandb_id"], config, job_type="report", upload=True)
    with _finished(mirror):
        mirror.start({}, [], [])
        mirror.show_report(runs)
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


def why_left_out(run: Run, watching: bool = False) -> str | None:
    """Return why a run is not to be pushed now, None where it is. `watching`: it may be while it is being trained."""
    other = pusher(run.path)
    return f"is being pushed by {other}" if other else _why_not_now(run, watching)


def _why_not_now(run: Run, watching: bool) -> str | None:
    if not run.summary:
        return "has not been started"
    if not (trainer := lock.holder(run.path)):
        return None
    if not watching:
        return f"is being trained ({trainer})"
    if "wandb_id" not in run.summary:
        return f"is being trained ({trainer}), which an earlier version began"
    if run.settings().tracker != "none" and run.summary.get("wandb_mode") not in ("offline", "disabled"):
        return f"is being trained ({trainer}), which tells W&B itself"
    return None


def pusher(folder: Path) -> str | None:
    """Return in words which other process brings a run to W&B; None if none does."""
    return lock.holder(folder / FOLDER)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[lock.Lock]:
    """Let no other process bring this folder to W&B."""
    try:
        own_lock = lock.acquire(folder / FOLDER)
    except UserError:
        raise NotPushed(f"{folder} is being pushed by {pusher(folder) or 'another process'}") from None
    except OSError as error:
        raise UserError(f"{folder / FOLDER} cannot be written ({error.strerror}): make it writable") from None
    try:
        with own_lock.kept():
            yield own_lock
    finally:
        own_lock.release()


@contextlib.contextmanager
def _finished(mirror: WandbMirror) -> Iterator[None]:
    """Finish a W&B run, as failed where the block raises an error. Raises NotPushed where W&B failed."""
    before = set(os.environ)
    error: BaseException | None = None
    try:
        yield
    except _Unfinished as unfinished:
        error = unfinished
    except BaseException as caught:
        error = caught
        raise
    finally:
        mirror.finish(error)
        for name in set(os.environ) - before:  # the mirror set W&B's folders for this run: the next one has others
            del os.environ[name]
    if mirror.mode not in ("online", "offline"):
        raise NotPushed(f"{mirror.path} could not be brought to W&B")


def _new_wandb_id(run: Run) -> str:
    """Make an id for a run that an earlier version trained without W&B, and save it in its summary.json."""
    wandb_id = secrets.token_hex(4)
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
    return wandb_id


def _read_wandb_ids(folder: Path) -> dict[str, str]:
    try:
        return dict(json.loads((folder / IDS_FILE).read_text()))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{folder / IDS_FILE} cannot be used ({error}): remove it, which makes a new run at W&B"
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
