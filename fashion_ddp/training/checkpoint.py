"""What a run that was stopped or killed continues from.

A checkpoint is one file, written by rank 0 at a sync point: torch.save's bytes followed by their sha256. It appears
under its name complete, or not at all. What is read back is verified first, and loaded as data: it cannot run code.
"""

import contextlib
import hashlib
import io
import os
from pathlib import Path
from typing import Any

import torch

from fashion_ddp.config import Config
from fashion_ddp.console import say
from fashion_ddp.distributed.world import World
from fashion_ddp.errors import TrainingFailed
from fashion_ddp.runs.folder import RunFolder, to_jsonable
from fashion_ddp.runs.provenance import identity
from fashion_ddp.training.state import State, fits

FORMAT = 2  # counts up when an older checkpoint would be misread
KEPT = 2


class Checkpoints:
    """The checkpoints of one run: the newest is loaded into `state` at once, `save` writes others."""

    def __init__(self, cfg: Config, world: World, folder: RunFolder, state: State):
        self.cfg, self.world, self.folder, self.state = cfg, world, folder, state
        self.path = folder.path / "checkpoints"
        found = world.on_rank_zero(self._newest)
        if found is not None:
            state.restore(_load(found), world.rank)  # the state in format 1 is that in format 2

    def save(self, required: bool) -> None:
        """Save the state. A collective, at a sync point.

        Raises TrainingFailed, on every rank, where it cannot be written and is `required`; otherwise that is a warning,
        and the next checkpoint tries again.
        """
        ranks = self.world.all_gather_object(self.state.of_this_rank())
        if required:
            self.world.on_rank_zero(lambda: self._save(ranks))
        elif self.world.rank == 0:
            try:
                self._save(ranks)
            except TrainingFailed as error:
                # Not the error's own words where the disk is at fault: they tell the user to begin again.
                why = getattr(error.__cause__, "strerror", None)
                problem = f"{self.path / self._name()} cannot be written ({why})" if why else error
                say(f"warning: no checkpoint at step {self.state.done}, to be tried again: {problem}")

    def _name(self) -> str:
        return f"step-{self.state.done:09}.pt"

    def _save(self, ranks: list[dict[str, Any]]) -> None:
        file = io.BytesIO()
        torch.save({"format": FORMAT, "run": _identity(self.cfg), **self.state.saved(ranks)}, file)
        content = file.getvalue()
        self._secure_records()
        self.folder.make_folder("checkpoints")
        self.folder.write(f"checkpoints/{self._name()}", content + hashlib.sha256(content).digest())
        for old in [*sorted(self.path.glob("step-*.pt"))[:-KEPT], *self.path.glob(".step-*")]:
            with contextlib.suppress(OSError):  # saved is saved: the next save tries again
                old.unlink()

    def _secure_records(self) -> None:
        """Force the records to the disk: a checkpoint that survives a power cut counts their lines as written."""
        for path in (self.folder.path / "steps.jsonl", self.folder.path / "metrics.jsonl"):
            try:
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
            except FileNotFoundError:
                pass
            except OSError as error:
                raise TrainingFailed(
                    f"{path} cannot be written ({error.strerror or error}): mend that, and give the same command "
                    "again, which continues from the last checkpoint"
                ) from error

    def _newest(self) -> bytes | None:
        """Return the newest checkpoint that is whole and belongs to this run. Newer ones that are not are renamed."""
        paths = sorted(self.path.glob("step-*.pt"), reverse=True)
        for path in paths:
            try:
                content = _verified(path.read_bytes())
                self._refuse_misfit(_load(content))
                return content
            except OSError as error:  # it may be whole, on a disk that is not there at present
                raise TrainingFailed(
                    f"{path} cannot be read ({error.strerror or error}): mend that, or remove it to go on from an "
                    "older one"
                ) from error
            except Exception as error:  # noqa: BLE001 - whatever is wrong with it, an older one may serve
                self._put_aside(path, error)
        if paths:
            say(f"warning: no checkpoint of {self.folder.path} can be used: the run starts again from nothing")
        return None

    def _put_aside(self, path: Path, error: Exception) -> None:
        aside = path.with_name(f"{path.name}.broken")
        try:
            path.replace(aside)
        except OSError as another:
            raise TrainingFailed(f"{path} cannot be renamed ({another.strerror or another}): mend that") from another
        why = str(error) if isinstance(error, ValueError) else f"its content is wrong: {type(error).__name__}"
        say(f"warning: {path} cannot be used ({why}): kept as {aside.name}; an older one is looked for")

    def _refuse_misfit(self, saved: Any) -> None:
        """Raise ValueError for a state that this run cannot have saved: no restore may fail halfway."""
        version = saved.get("format") if isinstance(saved, dict) else None
        if type(version) is not int or version not in (1, FORMAT):
            raise ValueError("it is no checkpoint of this version")
        run, theirs = _identity(self.cfg), saved.get("run")
        if isinstance(theirs, dict):  # an older version did not have, and so not name, all settings
            theirs = {name: getattr(Config, name, None) for name in run.keys() - theirs.keys()} | theirs
        if theirs != run or not fits(theirs, run):
            raise ValueError("it belongs to another run")
        self.state.check(saved)


def _identity(cfg: Config) -> dict[str, Any]:
    """Return what identifies the run of a checkpoint. The epochs do only where a schedule depends on them."""
    free = {"epochs"} if cfg.schedule == "constant" else set()
    return {name: value for name, value in to_jsonable(identity(cfg)).items() if name not in free}


def _verified(content: bytes) -> bytes:
    """Return the content of a checkpoint's file without its sha256. Raises ValueError where they do not agree."""
    body, digest = content[:-32], content[-32:]
    if hashlib.sha256(body).digest() != digest:
        raise ValueError("it is damaged or not a checkpoint: its content and its sha256 differ")
    return body


def _load(content: bytes) -> Any:
    """Read the state in a checkpoint. Raises ValueError where it is not plain data."""
    try:
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # its own words advise to run what is in the file
        raise ValueError("it is no torch file, or holds more than data") from error
