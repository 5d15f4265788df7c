"""Sync points: where ranks add up what they recorded, the host reads it, and they agree on what is due."""

import time
from collections.abc import Iterator

import torch
from torch import Tensor

from fashion_ddp.distributed import signals
from fashion_ddp.distributed.world import World, all_reduce


class SyncPoint:
    """Where all ranks meet, about once a second: the host reads what the device has recorded, and they agree whether to
    stop, and whether a checkpoint is due."""

    def __init__(self, world: World, save_every: float, seconds: float = 1.0):
        self.world, self.save_every, self.seconds = world, save_every, seconds
        self.length = 1  # steps in the next window; the first step alone, as it takes far longer than the others
        self.since = self.saved = time.perf_counter()
        self.stop: str | None = None  # why, where any rank was told to
        self.due = False  # a checkpoint

    def saved_now(self) -> None:
        """The next checkpoint is due an interval from now."""
        self.saved = time.perf_counter()

    def windows(self, steps: int, start: int = 0) -> Iterator[range]:
        """The steps `start` to `steps` - 1 of an epoch, cut at the sync points."""
        self.since = time.perf_counter()
        while start < steps:
            window = range(start, min(start + self.length, steps))
            yield window
            start = window.stop

    def __call__(self, rows: Tensor) -> list[list[float]]:
        """Add up the window's rows ([steps, n] float64) over the ranks, in one all-reduce, and read them."""
        if self.world.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        proposal, due = 0, False
        if self.world.rank == 0:
            proposal = max(1, round(len(rows) * self.seconds / max(now - self.since, 1e-6)))
            due = now - self.saved >= self.save_every
        message = torch.cat([rows.flatten(), rows.new_tensor([proposal, due, *signals.stop_requests()])])
        values = all_reduce(message).tolist()
        length, any_due, *told = values[rows.numel() :]
        self.length, self.due = int(length), any_due > 0
        self.stop = next((reason for reason, count in zip(signals.REASONS, told, strict=True) if count), None)
        self.since = time.perf_counter()
        return torch.tensor(values[: rows.numel()], dtype=torch.float64).view(rows.shape).tolist()
