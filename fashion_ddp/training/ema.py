"""An exponential moving average of the weights (Polyak averaging), which is evaluated and kept in their place."""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Average:
    """The moving average of a model's weights and statistics: `update` takes in those after one more optimizer update.

    Update t (from 1) keeps the share d (1 - d^(t-1)) / (1 - d^t) of the average: the weights before the first update
    have no part in it, and those after the first no more than any others, as Adam's bias correction has it (Kingma and
    Ba, arXiv 1412.6980). torch's AveragedModel starts from a copy of the first, which would be a quarter of the result
    of 1,400 updates with d = 0.999; and asks the card at each update whether it is the first.
    """

    def __init__(self, decay: float, trained: Sequence[nn.Parameter], model: nn.Module):
        """`trained`: the model's parameters that an optimizer changes."""
        self.decay, self.trained, self.model = decay, trained, model
        self.weights, self.buffers = ([tensor.clone() for tensor in tensors] for tensors in self._current())
        self.updates = self.weights[0].new_zeros((), dtype=torch.float64)

    @torch.no_grad()
    def update(self) -> None:
        """Take in the model's present weights and statistics. Reads nothing from the device."""
        before = self.decay**self.updates
        self.updates += 1
        share = self.decay * (1 - before) / (1 - self.decay * before)
        for averages, current in zip((self.weights, self.buffers), self._current(), strict=True):
            if averages:
                torch._foreach_sub_(averages, current)
                torch._foreach_mul_(averages, share.to(averages[0].dtype))
                torch._foreach_add_(averages, current)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within, the model has its averaged weights and statistics."""
        with lent(list(itertools.chain(*self._current())), [*self.weights, *self.buffers]):
            yield

    def _current(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return the model's present weights, and its statistics: a running mean is linear in the weights before it, so
        that the averages of both fit together without another pass over the data. Counts are not averaged."""
        buffers = [buffer for buffer in self.model.buffers() if buffer.is_floating_point()]
        return [parameter.detach() for parameter in self.trained], buffers


@contextmanager
def lent(places: list[Tensor], values: list[Tensor]) -> Iterator[None]:
    """Within, a model's tensors, `places`, have these values; then their own again. They stay where they are in memory,
    where a CUDA graph knows them."""
    before = [tensor.clone() for tensor in places]
    torch._foreach_copy_(places, values)
    try:
        yield
    finally:
        torch._foreach_copy_(places, before)
