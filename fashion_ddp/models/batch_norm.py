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


class GlobalBatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d over the global batch, whichever ranks hold its rows.

    Sums, squares and the count are added up over the ranks in one differentiable all-reduce. Rows of weight 0 do not
    count. (torch's SyncBatchNorm does not work on the CPU.)
    """

    row_weights: Tensor | None = None  # [N], 1 or 0; the step sets it before each forward pass

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or not self.weight.requires_grad:  # frozen: use the stored statistics and keep them
            stored = self.running_mean, self.running_var
            return F.batch_norm(input, *stored, self.weight, self.bias, training=False, eps=self.eps)
        x = input.float() if input.dtype in (torch.float16, torch.bfloat16) else input
        weights = x.new_ones(len(x)) if self.row_weights is None else self.row_weights
        weighted = x * weights.view(-1, 1, 1, 1)
        count = (weights.sum() * x[0, 0].numel()).view(1)
        moments = torch.cat([weighted.sum((0, 2, 3)), (weighted * x).sum((0, 2, 3)), count])
        total, squares, n = differentiable_all_reduce(moments).split([self.num_features, self.num_features, 1])
        mean = total / n
        variance = (squares / n - mean**2).clamp_min(0)
        with torch.no_grad():
            assert self.momentum is not None and self.running_mean is not None and self.running_var is not None
            assert self.num_batches_tracked is not None
            self.running_mean.lerp_(mean, self.momentum)
            # The unbiased variance, as nn.BatchNorm2d stores it.
            self.running_var.lerp_(variance * n / (n - 1).clamp_min(1), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (x * scale.view(1, -1, 1, 1) + (self.bias - mean * scale).view(1, -1, 1, 1)).to(input.dtype)
