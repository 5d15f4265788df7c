"""Where in its epoch a step stands: told by the host, as a number, or counted by the device itself.

What the host tells a kernel is fixed when it is launched; what the device counts is read when it runs. Only steps of
the second kind are the same list of kernels each time, so that `graph.capture` may record one and launch it as a whole.
On a CPU a number is better: a row of a table is then a view, which costs nothing.
"""

import torch
from torch import Tensor

Position = int | Tensor  # [1] int64 on the device


def at(table: Tensor, step: Position, piece: int) -> Tensor:
    """What a table [steps, pieces, rows] holds for one piece of a step: [rows]."""
    return table[step, piece] if isinstance(step, int) else table[:, piece].index_select(0, step).squeeze(0)


def put(table: Tensor, step: Position, piece: int, row: Tensor) -> None:
    """Write one piece of a step into a table [steps, pieces, rows]."""
    if isinstance(step, int):
        table[step, piece] = row
    else:
        table[:, piece].index_copy_(0, step, row.unsqueeze(0))


class Counters:
    """A device's own count: which batch of the epoch and which update of the run are next."""

    def __init__(self, lrs: list[float], like: Tensor):
        """`lrs`: the learning rate of every update of the run; `like`: a tensor of the device and type of numbers."""
        self.lrs = like.new_tensor(lrs)
        self.lr = like.new_zeros(())
        self.value = torch.zeros(2, dtype=torch.int64, device=like.device)
        self.batch, self.update = self.value.split(1)
        self.expected = 0, 0  # what the host knows to stand in value

    def stand_at(self, k: int, done: int) -> None:
        """Batch k of the epoch is next, after `done` updates: told to the device where it would count otherwise."""
        if (k, done) != self.expected:
            self.batch.fill_(k)
            self.update.fill_(done)
        self.expected = k + 1, done + 1

    def next_lr(self) -> Tensor:
        """The learning rate of the next update: a scalar, always at the same place in memory."""
        return self.lr.copy_(self.lrs.index_select(0, self.update).squeeze(0))

    def count(self) -> None:
        """A step has been taken."""
        self.value += 1
