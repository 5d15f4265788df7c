"""Optimizers by name, and the learning rate as a pure function of the step."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from fashion_ddp.config import Config
from fashion_ddp.training.muon import Muon

# What torch's optimizers keep of each parameter: `step` is a number, the rest is of the parameter's shape.
ADAM = ("step", "exp_avg", "exp_avg_sq")
MOMENTUM = ("momentum_buffer",)
KEPT: dict[str, tuple[str, ...]] = {"sgd": (), "momentum": MOMENTUM, "adam": ADAM, "adamw": ADAM, "muon": MOMENTUM}


def build(cfg: Config, model: nn.Module, device: torch.device) -> torch.optim.Optimizer:
    """Return the run's optimizer, of those parameters of the model that are trained."""
    groups = _groups(cfg, model)
    # One kernel per update. On a card it also keeps fp16's skipped updates from being read by the host; on a CPU it
    # gains for Adam, a third of the time of its dozen operations per parameter, and nothing for SGD.
    fused = True if device.type == "cuda" else None
    lr, decay = cfg.scaled_lr(), cfg.weight_decay
    if cfg.optimizer == "muon":
        return Muon(groups, lr=lr, momentum=cfg.momentum or 0.95, weight_decay=decay)
    if cfg.optimizer == "sgd" and device.type == "cpu" and not decay:
        return PlainSGD(groups, lr=lr)
    if cfg.optimizer in ("sgd", "momentum"):
        momentum = (cfg.momentum or 0.9) if cfg.optimizer == "momentum" else 0.0
        sgd = torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=cfg.nesterov, weight_decay=decay, fused=fused)
        if momentum and fused:
            # torch leaves them unwritten where fp16 skips the first update, as it often does, and goes on from that.
            for parameter in (parameter for group in sgd.param_groups for parameter in group["params"]):
                sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return sgd
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[cfg.optimizer]
    # Capturable: its count of updates stays on the card.
    return kind(groups, lr=lr, weight_decay=decay, fused=True, capturable=device.type == "cuda")


class PlainSGD(torch.optim.SGD):
    """SGD without momentum and decay, on a CPU. torch's own spends a tenth of a linear step on what this has no use
    for: hooks, profiling, and looking what is asked for."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Subtract the rate times the gradient from each parameter that has one, to the bits of torch's SGD."""
        with torch.no_grad():
            for group in self.param_groups:
                trained = [p for p in group["params"] if p.grad is not None]
                if trained:  # none where the update was compiled with the pass
                    torch._foreach_add_(trained, [p.grad for p in trained], alpha=-group["lr"])

    step.hooked = True  # type: ignore[attr-defined] # else torch wraps it, to call hooks and to profile


def _groups(cfg: Config, model: nn.Module) -> list[dict[str, Any]]:
    """Return the parameters that are trained, in groups of equal settings, in the form of torch's optimizers."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [{"params": parameters}]
    if cfg.optimizer == "muon":
        # As its author trains: the last layer by Adam, whether it is frozen or not.
        matrices = {id(parameter) for parameter in [p for p in model.parameters() if p.dim() > 1][:-1]}
        groups = [
            {"params": [p for p in parameters if id(p) in matrices], "method": "muon"},
            {"params": [p for p in parameters if id(p) not in matrices], "method": "adamw"},
        ]
        groups[1]["lr_ratio"] = cfg.adam_lr / cfg.lr
    if not cfg.decay_biases:
        weights = [group | {"params": [p for p in group["params"] if p.dim() > 1]} for group in groups]
        biases = [group | {"params": [p for p in group["params"] if p.dim() < 2]} for group in groups]
        groups = weights + [group | {"weight_decay": 0.0} for group in biases]
    return [group for group in groups if group["params"]]


def state_like(cfg: Config, optimizer: torch.optim.Optimizer) -> dict[int, dict[str, Tensor]]:
    """Return tensors like those that the run's optimizer keeps after an update, by the number of the parameter."""
    kept = (
        (parameter, KEPT[group.get("method", cfg.optimizer)])
        for group in optimizer.param_groups
        for parameter in group["params"]
    )
    return {
        number: {name: torch.zeros(()) if name == "step" else torch.empty_like(parameter) for name in names}
        for number, (parameter, names) in enumerate(kept)
        if names
    }


def schedule(cfg: Config, steps_per_epoch: int) -> list[float]:
    """Return the learning rate of every update of the run, in order."""
    peak, total, warmup = cfg.scaled_lr(), cfg.epochs * steps_per_epoch, cfg.warmup_epochs * steps_per_epoch
    return [peak * factor(cfg.schedule, step, total, warmup) for step in range(total)]


def factor(schedule: str, step: int, total: int, warmup: float = 0.0) -> float:
    """Return the learning rate of update `step` (from 0) of `total`, as a share of its peak.

    one_cycle is Smith and Topin's (arXiv 1708.07120) with the shape of torch.optim.lr_scheduler.OneCycleLR: a cosine
    from 1/25 up to 1 over 30 % of the steps, and down to 1/250,000.
    """
    if schedule == "one_cycle":
        top = 0.3 * total - 1
        if step < top:
            return _cosine(1 / 25, 1.0, step / top)
        return _cosine(1.0, 1 / 250_000, (step - top) / (total - 1 - top))
    if step < warmup:
        return (step + 1) / warmup if step + 1 < warmup else 1.0
    if schedule == "linear":
        return 1 - (step - warmup) / (total - warmup)
    if schedule == "cosine":
        return _cosine(1.0, 0.0, (step - warmup) / (total - warmup))
    return 1.0


def _cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2
