"""Which folder a run has, whose it is, and whether the run in it is to be begun, continued, or left as it is."""

import hashlib
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from fashion_ddp.runs import lock
from fashion_ddp.config import layers
from fashion_ddp.config import Config
from fashion_ddp.console import say
from fashion_ddp.errors import UserError
from fashion_ddp.runs.provenance import differences, identity
from fashion_ddp.runs.folder import RunFolder, plain
from fashion_ddp.runs.reading import read_run
from fashion_ddp.files import write_whole

# What a folder holds, to a command: nothing; a run that the command continues; this very run, complete; or, to
# --fresh, a run to be kept under another name.
State = Literal["nothing", "continue", "finished", "aside"]


def name(cfg: Config) -> str:
    """`<model>-<recipe>-seed<seed>`, then every setting that changes the result and differs from the recipe."""
    parts = [cfg.model, Path(cfg.recipe).stem, f"seed{cfg.seed}"]
    parts += [f"{key}{value}" for key, value in layers.recipe_changes(cfg).items()]
    text = re.sub(r"[^\w.+=-]+", "_", "-".join(parts)).lstrip(".")
    if len(text) > 80:
        text = f"{text[:71]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    return text


def folder_of(cfg: Config) -> Path:
    """The run's folder, as given or as named."""
    return cfg.run_dir or cfg.runs_dir / name(cfg)


class Outdated(UserError):
    """The folder holds this very run, but made by other code, versions or data."""


def check(cfg: Config, made_by_now: dict[str, Any], fresh: bool = False, reuse: bool = False) -> State:
    """What the run's folder holds.

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
    # A process that was killed at once leaves no more than a lock, and half of config.yaml; before it, a launcher its
    # count of starts, and where the ranks meet.
    begun = (lock.NAME, ".config.yaml.", "starts.jsonl", ".meet-", ".new-meet-")
    if all(name.startswith(begun) for name in found):
        return "nothing"
    if "config.yaml" not in found:
        raise UserError(f"{path} exists and is no run folder: choose another --run-dir")
    if fresh:
        return "aside"
    old = read_run(path)
    before = old.settings()
    longer = cfg.epochs > before.epochs and cfg.schedule == "constant"
    same_but_longer = replace(before, epochs=cfg.epochs) if longer else before
    if different := differences(plain(identity(same_but_longer)), plain(identity(cfg))):
        raise UserError(
            f"{path} belongs to another run ({'; '.join(different)}): choose another --run-dir, "
            "or --fresh to keep it under another name"
        )
    # By the epochs of its summary: a kill may have followed when config.yaml already asked for more.
    finished = old.summary.get("status") == "finished" and old.summary.get("epochs", before.epochs) >= cfg.epochs
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
    """Take the run's folder for this process: made, continued, or emptied by renaming what it held.

    Raises UserError where it belongs to another run, is held by another process, or cannot be written.
    """
    path = folder_of(cfg)
    try:
        # Before the lock, too: what is finished or not ours is not touched, not even by a lock file.
        if check(cfg, made_by_now, fresh, reuse) == "finished":
            return RunFolder(path, finished=True)
        held = lock.take(path)
        try:
            state = check(cfg, made_by_now, fresh, reuse)
            if state in ("nothing", "continue"):
                for left in [*path.glob(".*.part"), *path.glob(f"{lock.NAME}-*")]:  # by a kill
                    left.unlink(missing_ok=True)
                write_whole(path / "config.yaml", cfg.to_yaml(), held.check)
                return RunFolder(path, lock=held)
            if state == "aside":
                aside = next(p for n in range(1, 10**6) if not (p := path.with_name(f"{path.name}.{n}")).exists())
                path.rename(aside)
                for left in aside.glob(f"{lock.NAME}*"):
                    left.unlink(missing_ok=True)
                say(f"kept what {path} held as {aside}")
        except BaseException:
            held.release()
            raise
        held.release()
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}): choose another --runs-dir") from None
    # Anew without --fresh: nothing is there now; or what another process has begun meanwhile, or finished.
    return claim(cfg, made_by_now, reuse=reuse)
