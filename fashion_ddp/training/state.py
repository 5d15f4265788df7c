"""What training changes, in one object: what a checkpoint holds, and a run that was interrupted continues from.

Each part says what it saves, checks what it is given, and restores it: nothing is restored before all is checked.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fashion_ddp.config import Config
from fashion_ddp.config.names import is_code
from fashion_ddp.distributed.world import World
from fashion_ddp.training import optim
from fashion_ddp.training.choice import Choice
from fashion_ddp.training.ema import Average
from fashion_ddp.training.timing import StepClock, Timings


@dataclass
class Sums:
    """Sums over the rows of some steps."""

    loss: float = 0.0
    hits: float = 0.0
    rows: int = 0

    def add(self, loss: float, hits: float, rows: int) -> None:
        self.loss, self.hits, self.rows = self.loss + loss, self.hits + hits, self.rows + rows

    @property
    def mean_loss(self) -> float:
        return self.loss / self.rows

    @property
    def accuracy(self) -> float:
        return self.hits / self.rows


@dataclass
class Recorded:
    """How far the run's files have been written: what the recorder continues from."""

    step: int = 0  # updates since the run began
    lr: float = 0.0  # of the last of them
    total: Sums = field(default_factory=Sums)  # of the epoch
    bin: Sums = field(default_factory=Sums)  # since the last point of steps.jsonl

    def restore(self, saved: dict[str, Any]) -> None:
        self.step, self.lr = saved["step"], saved["lr"]
        self.total, self.bin = Sums(**saved["total"]), Sums(**saved["bin"])


class State:
    """The state of one run, as one of its ranks holds it."""

    def __init__(
        self,
        cfg: Config,
        world: World,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        steps_per_epoch: int,
        started: float,
        average: Average | None = None,
    ):
        """`model`: the module itself, without DDP's wrapper. `started`: time.time() when the command began. `average`:
        what the steps update."""
        self.cfg, self.device, self.scaler = cfg, world.device, world.accelerator.scaler
        self.model, self.optimizer, self.average = model, optimizer, average
        self.steps, self.total_steps = steps_per_epoch, cfg.epochs * steps_per_epoch
        self.done = 0  # updates since the run began
        self.choice = Choice(cfg, world, model)
        self.clock, self.timings = StepClock(world.device), Timings(started)
        self.recorded = Recorded()

    # --- Where the run stands ---------------------------------------------------------------------------------------

    def advance(self) -> None:
        """Count one more update, and the time that it took."""
        self.done += 1
        self.clock.stop()

    @property
    def trained_to_the_end(self) -> bool:
        return self.done == self.total_steps

    @property
    def epoch(self) -> int:
        """The epoch of the last update, from 1."""
        return -(-self.done // self.steps)

    @property
    def position(self) -> str:
        """Where the run stands, in words."""
        return f"epoch {self.epoch}, at step {self.done} of {self.total_steps}"

    def epochs(self) -> range:
        """Return the epochs that are not done, from 1; an epoch is done when it was evaluated."""
        return range(max(1, self.epoch), self.cfg.epochs + 1)

    def steps_of(self, epoch: int) -> int:
        """Return how many steps of an epoch are done."""
        return min(max(self.done - (epoch - 1) * self.steps, 0), self.steps)

    def averaged(self) -> AbstractContextManager[None]:
        """Within, the model is what is evaluated after an epoch: its moving average, where the run has one."""
        return nullcontext() if self.average is None else self.average.in_place()

    def kept(self) -> AbstractContextManager[None]:
        """Within, the model is what the run keeps: as it was evaluated after the best epoch, or else after the last."""
        return self.choice.in_place() if self.cfg.keep == "best" else self.averaged()

    # --- What is saved ----------------------------------------------------------------------------------------------

    def of_this_rank(self) -> dict[str, Any]:
        """Return what may differ between ranks: random generators, and statistics of layers that keep their own."""
        cuda = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        buffers = [buffer.detach().cpu() for buffer in self._buffers()]
        return {"generator": torch.get_rng_state(), "cuda_generator": cuda, "buffers": buffers}

    def saved(self, ranks: list[dict[str, Any]]) -> dict[str, Any]:
        """Return all that the run continues from. `ranks`: what `of_this_rank` gave on each."""
        step = {
            "done": self.done,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict()["state"],
            "scaler": self.scaler.state_dict() if self.scaler else {},
        }
        if self.average is not None:
            step["average"] = {"updates": self.average.updates, "weights": self.average.weights}
        if self.cfg.chooses:
            step["choice"] = self.choice.state()
        parts = {"clock": self.clock.state(), "timings": self.timings.state(), "recorder": asdict(self.recorded)}
        return {"step": step, "ranks": ranks} | parts

    def check(self, saved: dict[str, Any]) -> None:
        """Raise ValueError, or another error, for a state that this run cannot have saved."""
        done, ranks = saved["step"]["done"], saved["ranks"]
        if not 0 < done <= self.total_steps:
            raise ValueError(f"its step {done} is none of this run's")
        # A user's own model may have parameters that the loss does not reach: they have no entry.
        kept = optim.state_like(self.cfg, self.optimizer)
        kept = {n: one for n, one in kept.items() if n in saved["step"]["optimizer"] or not is_code(self.cfg.model)}
        like = self.saved([_same_generators(self.of_this_rank(), rank) for rank in ranks] or [self.of_this_rank()])
        like["step"]["optimizer"] = kept
        like["clock"] = StepClock.like(saved["clock"])
        like["timings"] = Timings.like(epochs=-(-done // self.steps) - 1)
        for name, part in like.items():
            if not fits(saved[name], part):
                raise ValueError(f"its part {name!r} is none of this run's")
        if saved["recorder"]["step"] != done:
            raise ValueError("its record ends at another step than its weights")
        for rank in ranks:
            torch.Generator().set_state(rank["generator"])  # raises where it is none

    def restore(self, saved: dict[str, Any], rank: int) -> None:
        """Continue, as this rank, from a state that another process of the run has saved and `check` has accepted."""
        step = saved["step"]
        self.done = step["done"]
        self.model.load_state_dict(step["model"])
        groups = self.optimizer.state_dict()["param_groups"]  # ours, not the saved: `fused` depends on the device
        self.optimizer.load_state_dict({"state": step["optimizer"], "param_groups": groups})
        if self.average is not None:
            self.average.updates.copy_(step["average"]["updates"])
            torch._foreach_copy_(self.average.weights, step["average"]["weights"])
        if self.cfg.chooses:
            self.choice.restore(step["choice"])
        if self.scaler and step["scaler"]:
            self.scaler.load_state_dict(step["scaler"])
        if rank < len(saved["ranks"]):
            self._restore_rank(saved["ranks"][rank])
        else:  # a rank that the saving run did not have: rank 0's statistics, and generators of its own
            self._restore_rank(self.of_this_rank() | {"buffers": saved["ranks"][0]["buffers"]})
        self.clock.restore(saved["clock"])
        self.timings.restore(saved["timings"])
        self.recorded.restore(saved["recorder"])

    def _restore_rank(self, saved: dict[str, Any]) -> None:
        torch.set_rng_state(saved["generator"])
        if saved["cuda_generator"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(saved["cuda_generator"], self.device)
        for buffer, value in zip(self._buffers(), saved["buffers"], strict=True):
            buffer.copy_(value)

    def _buffers(self) -> list[Tensor]:
        """Return the model's buffers, their averages, and those of the best epoch."""
        return [*self.model.buffers(), *(self.average.buffers if self.average else ()), *self.choice.buffers]


def _same_generators(own: dict[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
    """Return what a saved rank's state must be like: this rank's, but for a card's generator that only one of them
    has."""
    unused = own["cuda_generator"] is None or saved["cuda_generator"] is None
    return own | {"cuda_generator": saved["cuda_generator"]} if unused else own


def fits(value: Any, like: Any) -> bool:
    """Return whether a value is built like another: of the same types, with the same keys, lengths and shapes.

    Equality alone would take True for 1.
    """
    if isinstance(like, dict):
        return isinstance(value, dict) and value.keys() == like.keys() and all(fits(value[k], like[k]) for k in like)
    if isinstance(like, list):
        return isinstance(value, list) and len(value) == len(like) and all(map(fits, value, like))
    if isinstance(like, Tensor):
        same = isinstance(value, Tensor) and (value.shape, value.dtype) == (like.shape, like.dtype)
        return same and value.device.type == "cpu" and value.layout == torch.strided
    return type(value) is type(like)
