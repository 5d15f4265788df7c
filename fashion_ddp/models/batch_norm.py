"""Normalize over the global batch, whichever ranks hold its rows."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fashion_ddp.distributed.world import all_reduce


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return all_reduce(tensor.clone())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return all_reduce(grads[0].clone())


def differentiable_all_reduce(tensor: Tensor) -> Tensor:
    """Return the sum of a tensor over the ranks. Backward, each rank gets the sum of all ranks' gradients."""
    return _Sum.apply(tensor)


class GlobalBatchNorm(nn.Module):
    """What makes a batch norm of torch's one over the global batch, whichever ranks hold its rows.

    Sums, squares and the count are added up over the ranks in one differentiable all-reduce. Rows of weight 0 do not
    count. (torch's SyncBatchNorm does not work on the CPU.)
    """

    # As torch's batch norms have them. (What these have in common torch keeps private.)
    weight: nn.Parameter
    bias: nn.Parameter
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None
    num_features: int
    eps: float
    momentum: float | None

    row_weights: Tensor | None = None  # [N], 1 or 0; the step sets it before each forward pass
    whole_batch: bool = False  # the rows are the global batch, and none has weight 0; the step sets it, too

    def forward(self, input: Tensor) -> Tensor:
        stored = self.running_mean, self.running_var
        if not self.training or not self.weight.requires_grad:  # frozen: use the stored statistics and keep them
            return F.batch_norm(input, *stored, self.weight, self.bias, training=False, eps=self.eps)
        assert self.momentum is not None and self.running_mean is not None and self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        if self.whole_batch:  # torch's own kernel reads the input half as often
            return F.batch_norm(input, *stored, self.weight, self.bias, True, self.momentum, self.eps)
        x = input.float() if input.dtype in (torch.float16, torch.bfloat16) else input
        weights = x.new_ones(len(x)) if self.row_weights is None else self.row_weights
        rows, channels = (-1, *[1] * (x.dim() - 1)), (1, -1, *[1] * (x.dim() - 2))
        but_channels = [0, *range(2, x.dim())]
        weighted = x * weights.view(rows)
        count = (weights.sum() * x[0, 0].numel()).view(1)
        moments = torch.cat([weighted.sum(but_channels), (weighted * x).sum(but_channels), count])
        total, squares, n = differentiable_all_reduce(moments).split([self.num_features, self.num_features, 1])
        mean = total / n
        variance = (squares / n - mean**2).clamp_min(0)
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            # The unbiased variance, as torch stores it.
            self.running_var.lerp_(variance * n / (n - 1).clamp_min(1), self.momentum)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (x * scale.view(channels) + (self.bias - mean * scale).view(channels)).to(input.dtype)


class GlobalBatchNorm1d(GlobalBatchNorm, nn.BatchNorm1d):
    """nn.BatchNorm1d over the global batch."""


class GlobalBatchNorm2d(GlobalBatchNorm, nn.BatchNorm2d):
    """nn.BatchNorm2d over the global batch."""
