"""Muon: momentum, made orthogonal, trains matrices; AdamW trains the rest.

Keller Jordan et al., https://kellerjordan.github.io/posts/muon/, by the formula of torch.optim.Muon. That one always
multiplies in bfloat16, refuses kernels, and takes the rate from the host: not for a proof in float64, a convolution, or
a step that is recorded.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

ITERATIONS = 5
A, B, C = 3.4445, -4.7750, 2.0315  # of the polynomial a x + b x^3 + c x^5, the steepest at 0 that stays near 1
BETAS, EPS = (0.9, 0.999), 1e-8  # of AdamW, torch's defaults


class Muon(torch.optim.Optimizer):
    """Trains groups of `method` muon by Muon (parameters of two or more dimensions), and those of adamw by AdamW, at
    `lr_ratio` times their `lr`. `lr` may be a tensor: the host reads nothing."""

    def __init__(self, groups: Iterable[dict[str, Any]], lr: float, momentum: float, weight_decay: float):
        # torch brings the count of updates of a group that is fused to the group's device when it is loaded.
        defaults = {"lr": lr, "lr_ratio": 1.0, "momentum": momentum, "weight_decay": weight_decay, "fused": True}
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            if parameters := [p for p in group["params"] if p.grad is not None]:
                update = self._muon if group["method"] == "muon" else self._adamw
                update(group, parameters, [p.grad for p in parameters])

    def _muon(self, group: dict[str, Any], parameters: list[Tensor], gradients: list[Tensor]) -> None:
        momentum, buffers = group["momentum"], self._kept(parameters, "momentum_buffer")
        torch._foreach_lerp_(buffers, gradients, 1 - momentum)
        changes = list(torch._foreach_lerp(gradients, buffers, momentum))
        by_shape: dict[tuple[int, int], list[int]] = {}
        for place, parameter in enumerate(parameters):
            by_shape.setdefault((len(parameter), parameter[0].numel()), []).append(place)
        for (rows, columns), places in by_shape.items():  # of one shape in one product: fewer kernels on a card
            matrices = orthogonalized(torch.stack([changes[place].flatten(1) for place in places]))
            matrices *= math.sqrt(max(1, rows / columns))
            for place, matrix in zip(places, matrices, strict=True):
                changes[place] = matrix.view(parameters[place].shape)
        if group["weight_decay"]:
            torch._foreach_add_(changes, parameters, alpha=group["weight_decay"])
        torch._foreach_mul_(changes, group["lr"])
        torch._foreach_sub_(parameters, changes)

    def _adamw(self, group: dict[str, Any], parameters: list[Tensor], gradients: list[Tensor]) -> None:
        adamw(
            parameters,
            gradients,
            self._kept(parameters, "exp_avg"),
            self._kept(parameters, "exp_avg_sq"),
            [],
            self._kept(parameters, "step"),
            fused=True,
            amsgrad=False,
            beta1=BETAS[0],
            beta2=BETAS[1],
            lr=group["lr"] * group["lr_ratio"],
            weight_decay=group["weight_decay"],
            eps=EPS,
            maximize=False,
        )

    def _kept(self, parameters: list[Tensor], name: str) -> list[Tensor]:
        """Return what is kept of the parameters under this name: zeros before their first update."""
        for parameter in parameters:
            if name not in self.state[parameter]:
                like = parameter.new_zeros((), dtype=torch.float32) if name == "step" else torch.zeros_like(parameter)
                self.state[parameter][name] = like
        return [self.state[parameter][name] for parameter in parameters]


def orthogonalized(matrices: Tensor) -> Tensor:
    """Return matrices [n, rows, columns] with all singular values brought near 1 (0.7 to 1.2) by Newton-Schulz.

    It multiplies in the matrices' own type; on a card float32 in bfloat16, which this iteration bears (see the post).
    """
    x = matrices.bfloat16() if matrices.is_cuda and matrices.dtype == torch.float32 else matrices
    wide = x.mT if x.shape[1] > x.shape[2] else x
    wide = wide / wide.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(ITERATIONS):
        gram = wide @ wide.mT
        wide = torch.baddbmm(wide, torch.baddbmm(gram, gram, gram, beta=B, alpha=C), wide, beta=A)
    return (wide.mT if x.shape[1] > x.shape[2] else wide).to(matrices.dtype)
