"""Name a run's folder, decide whether to begin, continue or leave the run in it, and take it for this process."""

import hashlib
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from fashion_ddp.config import Config, layers
from fashion_ddp.console import say
from fashion_ddp.errors import UserError
from fashion_ddp.files import write_whole
from fashion_ddp.runs import lock
from fashion_ddp.runs.folder import RunFolder, to_jsonable
from fashion_ddp.runs.provenance import differences, identity
from fashion_ddp.runs.reading import load_run

# What a folder means to a command: it holds nothing; a run to continue; exactly this run, finished; or, with --fresh, a
# run to put aside under another name.
State = Literal["nothing", "continue", "finished", "aside"]


def run_name(cfg: Config) -> str:
    """Return `<model>-<recipe>-seed<seed>`, then every setting that changes the result and differs from the recipe."""
    parts = [cfg.model, Path(cfg.recipe).stem, f"seed{cfg.seed}"]
    parts += [f"{key}{value}" for key, value in layers.recipe_changes(cfg).items()]
    text = re.sub(r"[^\w.+=-]+", "_", "-".join(parts)).lstrip(".")
    if len(text) > 80:
        text = f"{text[:71]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    return text


def folder_of(cfg: Config) -> Path:
    """Return the run's folder: --run-dir, or else the run's name below --runs-dir."""
    return cfg.run_dir or cfg.runs_dir / run_name(cfg)


class Outdated(UserError):
    """The folder holds this run, but made by other code, versions or data."""


def check(cfg: Config, made_by_now: dict[str, Any], fresh: bool = False, reuse: bool = False) -> State:
    """Return what the run's folder means to this command.

    Raises UserError for a folder that belongs to something else, Outdated for a run that other code began or finished.
    """
    path = folder_of(cfg)
    try:
        return _check(path, cfg, made_by_now, fresh, reuse)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): choose another --run-dir") from None


def _check(path: Path, cfg: Config, made_by_now: dict[str, Any], fresh: bool, reuse: bool) -> State:
    try:
        found = {p.name for p in path.iterdir()}
    except FileNotFoundError:
        found = set()
    except NotADirectoryError:
        found = {path.name} if path.exists() else set()
    # A process that was killed at once leaves only a lock and a part of config.yaml. Before it, a launcher may have
    # written its count of starts and the address of rank 0.
    remains = (lock.NAME, ".config.yaml.", "starts.jsonl", ".starts.jsonl.", ".meet-", ".new-meet-")
    if all(name.startswith(remains) for name in found):
        return "nothing"
    if "config.yaml" not in found:
        raise UserError(f"{path} exists and is no run folder: choose another --run-dir")
    if fresh:
        return "aside"
    old = load_run(path)
    before = old.settings()
    longer = cfg.epochs > before.epochs and cfg.schedule == "constant"
    same_but_longer = replace(before, epochs=cfg.epochs) if longer else before
    if different := differences(to_jsonable(identity(same_but_longer)), to_jsonable(identity(cfg))):
        raise UserError(
            f"{path} belongs to another run ({'; '.join(different)}): choose another --run-dir, "
            "or --fresh to keep it under another name"
        )
    # Compare with the epochs in the summary: a kill may have come when config.yaml already asked for more.
    # A run that stopped early would stop there with more of them, too.
    enough = "stopped_early" in old.summary or old.summary.get("epochs", before.epochs) >= cfg.epochs
    finished = old.summary.get("status") == "finished" and enough
    start = old.environment[-1] if old.environment else {}
    different = differences(start.get("made_by", {}), made_by_now)
    if different and not reuse and (finished or any((path / "checkpoints").glob("*.pt"))):
        was, accepts = ("finished", "accepts it") if finished else ("begun", "continues it all the same")
        raise Outdated(
            f"{path} was {was} by other code or versions than these ({'; '.join(different)}): "
            f"--fresh keeps it under another name and trains anew, --reuse {accepts}"
        )
    return "finished" if finished else "continue"


def claim(cfg: Config, made_by_now: dict[str, Any], fresh: bool = False, reuse: bool = False) -> RunFolder:
    """Take the run's folder for this process: make it, continue its run, or rename it and make a new one.

    Raises UserError where it belongs to another run, another process works in it, or it cannot be written; Outdated as
    `check` does.
    """
    path = folder_of(cfg)
    try:
        # Check before locking, too: a folder that is finished or not ours gets no file, not even a lock.
        if check(cfg, made_by_now, fresh, reuse) == "finished":
            return RunFolder(path, finished=True)
        own_lock = lock.acquire(path)
        try:
            state = check(cfg, made_by_now, fresh, reuse)
            if state in ("nothing", "continue"):
                for left in [*path.glob(".*.part"), *path.glob(f"{lock.NAME}-*")]:  # left by a kill
                    left.unlink(missing_ok=True)
                write_whole(path / "config.yaml", cfg.to_yaml(), own_lock.check)
                return RunFolder(path, lock=own_lock)
            if state == "aside":
                aside = next(p for n in range(1, 10**6) if not (p := path.with_name(f"{path.name}.{n}")).exists())
                path.rename(aside)
                for left in aside.glob(f"{lock.NAME}*"):
                    left.unlink(missing_ok=True)
                say(f"kept what {path} held as {aside}")
        except BaseException:
            own_lock.release()
            raise
        own_lock.release()
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}): choose another --runs-dir") from None
    # Again without --fresh: the folder is gone now, or another process has begun or finished the run meanwhile.
    return claim(cfg, made_by_now, reuse=reuse)
