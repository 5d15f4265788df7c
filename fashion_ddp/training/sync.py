"""Sync points: about once a second ranks add up what their steps recorded, the host reads it, and they agree on what
is due: a stop, a checkpoint, the length of the next window of steps."""

import math
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fashion_ddp.config import Config
from fashion_ddp.distributed import signals
from fashion_ddp.distributed.world import World, all_reduce
from fashion_ddp.errors import TrainingFailed
from fashion_ddp.training.batches import Batches, Position, Rows
from fashion_ddp.training.state import State


class Trained(NamedTuple):
    """How one step went, over the global batch."""

    loss: float  # sum of the rows' losses
    hits: float  # rows predicted right
    rows: int
    lr: float


class StepRecord:
    """What the steps of an epoch left on this rank's device, read by nobody before the next sync point:

    losses, predicted    [steps, pieces, rows], of every row of the rank's pieces
    """

    def __init__(self, batches: Batches):
        self.batches = batches
        self.losses = torch.zeros_like(batches.weights)
        self.predicted = torch.zeros_like(batches.targets)
        self.rows = Rows(self.losses, self.predicted)

    def write(self, k: Position, piece: int, losses: Tensor, predicted: Tensor) -> None:
        """Keep one piece's losses and predicted classes, [rows] each."""
        self.rows.write(k, piece, losses, predicted)

    def sums(self, window: range) -> Tensor:
        """Return the rank's sum of losses and its hits at each step of the window: float64 [steps, 2]."""
        steps = slice(window.start, window.stop)
        weights = self.batches.weights[steps].double()
        right = self.predicted[steps] == self.batches.targets[steps]
        return torch.stack([(table * weights).sum((1, 2)) for table in (self.losses[steps], right)], dim=1)


class SyncPoint:
    """Where all ranks meet: `windows` cuts an epoch into steps between two sync points, and `read` is one."""

    def __init__(
        self, cfg: Config, world: World, record: StepRecord, state: State, rates: list[float], seconds: float = 1.0
    ):
        """`rates`: the learning rate of each update of the run. `seconds`: how long a window is to take."""
        self.world, self.record, self.state, self.rates = world, record, state, rates
        self.save_every, self.seconds = cfg.checkpoint_every, seconds
        self.length = 1  # steps in the next window; the first step alone, as it takes far longer than the others
        self.since = self.saved = time.perf_counter()
        self.stop: str | None = None  # why, where any rank was asked to stop
        self.save_due = False

    def windows(self, steps: int, start: int = 0) -> Iterator[range]:
        """Yield the steps `start` to `steps` - 1 of an epoch, cut at the sync points."""
        self.since = time.perf_counter()
        while start < steps:
            window = range(start, min(start + self.length, steps))
            self.state.clock.start()
            yield window
            start = window.stop

    def read(self, window: range) -> list[Trained]:
        """Add up the window's steps over all ranks, in one all-reduce, and return how each went.

        Sets `stop`, `save_due` and the next window's length, on every rank the same. Raises TrainingFailed, on every
        rank, where a loss is not finite.
        """
        sums = self._reduce(self.record.sums(window))
        self.state.clock.read()
        first = self.state.done - len(window)
        for update, (loss, _) in enumerate(sums, start=first):
            if not math.isfinite(loss):
                raise TrainingFailed(
                    f"the loss is {loss} at step {update + 1}, where lr is {self.rates[update]:g}: "
                    "training went off; try a smaller --lr, a warm-up or --clip-norm 1"
                )
        return [
            Trained(loss, hits, self.record.batches.in_batch[k], self.rates[update])
            for update, (k, (loss, hits)) in enumerate(zip(window, sums, strict=True), start=first)
        ]

    def saved_now(self) -> None:
        """Let the next checkpoint be due an interval from now."""
        self.saved = time.perf_counter()

    def _reduce(self, rows: Tensor) -> list[list[float]]:
        """Add rows [steps, n], float64, up over the ranks, and with them what each rank knows of stops and saves."""
        if self.world.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        proposal, due = 0, False
        if self.world.rank == 0:
            proposal = max(1, round(len(rows) * self.seconds / max(now - self.since, 1e-6)))
            due = now - self.saved >= self.save_every
        message = torch.cat([rows.flatten(), rows.new_tensor([proposal, due, *signals.stop_requests()])])
        values = all_reduce(message).tolist()
        length, any_due, *requests = values[rows.numel() :]
        self.length, self.save_due = int(length), any_due > 0
        self.stop = signals.reason(requests)
        self.since = time.perf_counter()
        return torch.tensor(values[: rows.numel()], dtype=torch.float64).view(rows.shape).tolist()
