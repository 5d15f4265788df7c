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
from torch import nn

from fashion_ddp.config import Config
from fashion_ddp.config.names import is_code
from fashion_ddp.console import say
from fashion_ddp.distributed.world import World
from fashion_ddp.errors import Stopped, TrainingFailed
from fashion_ddp.runs.folder import RunFolder, to_jsonable
from fashion_ddp.runs.provenance import identity
from fashion_ddp.training import optim
from fashion_ddp.training.recorder import NullRecorder
from fashion_ddp.training.step import Step
from fashion_ddp.training.timing import Timings

FORMAT = 1  # counts up when an older checkpoint would be misread
KEPT = 2


class Checkpoints:
    """The checkpoints of one run: the newest is loaded at once, others follow."""

    def __init__(self, cfg: Config, world: World, folder: RunFolder, step: Step, timings: Timings):
        self.cfg, self.world, self.folder, self.step, self.timings = cfg, world, folder, step, timings
        self.path = folder.path / "checkpoints"
        self.steps = step.batches.steps
        self.recorder: dict[str, Any] = {}  # what the recorder goes on from
        found = world.on_rank_zero(self._newest)
        if found is not None:
            self._restore(_load(found))

    def steps_of(self, epoch: int) -> int:
        """How many steps of an epoch are done."""
        return min(max(self.step.done - (epoch - 1) * self.steps, 0), self.steps)

    def epochs(self) -> range:
        """The epochs that are not done, from 1; an epoch is done when it was evaluated."""
        return range(max(1, -(-self.step.done // self.steps)), self.cfg.epochs + 1)

    def keep(self, recorder: NullRecorder) -> None:
        """At a sync point: save where that is due. Raises Stopped, when saved, where any rank was told to stop."""
        sync, last = self.step.sync, self.step.done == self.cfg.epochs * self.steps
        if not (sync.due or sync.stop or last):
            return
        ranks = self.world.all_gather_object(self.step.own_state())
        must = bool(sync.stop) or last
        if must:
            self.world.on_rank_zero(lambda: self._save(recorder, ranks))
        elif self.world.rank == 0:
            try:
                self._save(recorder, ranks)
            except TrainingFailed as error:
                # Not the error's own words where the disk is at fault: they tell the user to begin again.
                why = getattr(error.__cause__, "strerror", None)
                problem = f"{self.path / self._name()} cannot be written ({why})" if why else error
                say(f"warning: no checkpoint at step {self.step.done}, to be tried again: {problem}")
        sync.saved_now()
        if sync.stop:
            epoch = -(-self.step.done // self.steps)
            raise Stopped(
                f"stopped ({sync.stop}) and saved in epoch {epoch}, at step {self.step.done} of "
                f"{self.cfg.epochs * self.steps}: the same command continues",
                sync.stop,
            )

    def _name(self) -> str:
        return f"step-{self.step.done:09}.pt"

    def _save(self, recorder: NullRecorder, ranks: list[dict[str, Any]]) -> None:
        state = {
            "format": FORMAT,
            "run": _identity(self.cfg),
            "step": self.step.state(),
            "ranks": ranks,
            "clock": self.step.clock.state(),
            "timings": self.timings.state(),
            "recorder": recorder.state(),
        }
        file = io.BytesIO()
        torch.save(state, file)
        content = file.getvalue()
        self._secure_records()
        self.folder.make_folder("checkpoints")
        self.folder.write(f"checkpoints/{self._name()}", content + hashlib.sha256(content).digest())
        for old in [*sorted(self.path.glob("step-*.pt"))[:-KEPT], *self.path.glob(".step-*")]:
            with contextlib.suppress(OSError):  # saved is saved: the next save tries again
                old.unlink()

    def _secure_records(self) -> None:
        """Lines that the checkpoint counts as written must outlive the machine, as the checkpoint does."""
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
        """The newest checkpoint that is whole and this run's; what is newer and is not, is put aside by name."""
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

    def _refuse_misfit(self, state: Any) -> None:
        """Raises ValueError for what is no state of this run, so that a restore, once begun, is not given up."""
        if not isinstance(state, dict) or state.get("format") != FORMAT:
            raise ValueError("it is no checkpoint of this version")
        if state.get("run") != _identity(self.cfg):
            raise ValueError("it belongs to another run")
        done, ranks = state["step"]["done"], state["ranks"]
        if not 0 < done <= self.cfg.epochs * self.steps:
            raise ValueError(f"its step {done} is none of this run's")
        epochs = -(-done // self.steps) - 1  # that are over
        own, sums = self.step.own_state(), {"loss": 0.0, "hits": 0.0, "rows": 0}
        like = {
            "format": FORMAT,
            "run": _identity(self.cfg),
            "step": self.step.state() | {"optimizer": self._optimizer_like(state["step"]["optimizer"])},
            "ranks": [_unless_unused(own, rank) for rank in ranks] if ranks else [own],
            "clock": {"first": 0.0, "seconds": torch.zeros(len(state["clock"]["seconds"]))},
            "timings": {
                "seconds": dict.fromkeys(("train", "eval"), [0.0] * epochs) if epochs else {},
                **dict.fromkeys(("startup", "total", "current"), 0.0),
            },
            "recorder": {"step": 0, "lr": 0.0, "total": sums, "bin": sums},
        }
        for name, part in like.items():
            if not _fits(state[name], part):
                raise ValueError(f"its part {name!r} is none of this run's")
        if state["recorder"]["step"] != done:
            raise ValueError("its record ends at another step than its weights")
        for rank in ranks:
            torch.Generator().set_state(rank["generator"])  # which says whether it is one

    def _optimizer_like(self, saved: dict[int, Any]) -> dict[int, Any]:
        """A state of the run's optimizer, as an update leaves it."""
        parameters = [nn.Parameter(p.detach().clone()) for p in self.step.trained]
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimizer = optim.build(self.cfg, parameters, self.world.device)
        optimizer.step()
        state = optimizer.state_dict()["state"]
        # A user's own model may have parameters that the loss does not reach: they have no entry.
        return {at: entry for at, entry in state.items() if at in saved or not is_code(self.cfg.model)}

    def _restore(self, state: dict[str, Any]) -> None:
        self.recorder = state["recorder"]
        self.step.restore(state["step"])
        if self.world.rank < len(state["ranks"]):
            self.step.restore_own(state["ranks"][self.world.rank])
        else:  # a rank that the saving run did not have takes after the first, with generators of its own
            mine = self.step.own_state()
            self.step.restore_own(mine | {"buffers": state["ranks"][0]["buffers"]})
        self.step.clock.restore(state["clock"])
        self.timings.restore(state["timings"])


def _identity(cfg: Config) -> dict[str, Any]:
    """Of the run that a checkpoint belongs to. How long it trains may change, where no schedule depends on it."""
    free = {"epochs"} if cfg.schedule == "constant" else set()
    return {name: value for name, value in to_jsonable(identity(cfg)).items() if name not in free}


def _unless_unused(own: dict[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
    """What a saved rank's own state must be like: this one's, but for a card's generator that one of them has not."""
    unused = own["cuda_generator"] is None or saved["cuda_generator"] is None
    return own | {"cuda_generator": saved["cuda_generator"]} if unused else own


def _fits(value: Any, like: Any) -> bool:
    """Whether a value is built like another: of the same types, with the same keys, lengths and shapes."""
    if isinstance(like, dict):
        return isinstance(value, dict) and value.keys() == like.keys() and all(_fits(value[k], like[k]) for k in like)
    if isinstance(like, list):
        return isinstance(value, list) and len(value) == len(like) and all(map(_fits, value, like))
    if isinstance(like, torch.Tensor):
        same = isinstance(value, torch.Tensor) and (value.shape, value.dtype) == (like.shape, like.dtype)
        return same and value.device.type == "cpu" and value.layout == torch.strided
    return type(value) is type(like)


def _verified(content: bytes) -> bytes:
    """The content of a checkpoint's file without its sha256. Raises ValueError where they do not agree."""
    body, digest = content[:-32], content[-32:]
    if hashlib.sha256(body).digest() != digest:
        raise ValueError("it is damaged or not a checkpoint: its content and its sha256 differ")
    return body


def _load(content: bytes) -> Any:
    """The state in a checkpoint. Raises ValueError for what is not data alone."""
    try:
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # its own words advise to run what is in the file
        raise ValueError("it is no torch file, or holds more than data") from error
