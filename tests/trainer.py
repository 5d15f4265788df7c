"""What `train` builds around a step, for tests that take single steps."""

import time
from typing import Any

import torch
from torch import nn

from fashion_ddp.config import Config
from fashion_ddp.distributed.world import World
from fashion_ddp.training import optim
from fashion_ddp.training.batches import Batches
from fashion_ddp.training.state import State
from fashion_ddp.training.step import Step
from fashion_ddp.training.sync import StepRecord, SyncPoint, Trained


class Trainer:
    """`trainer(k)` trains on global batch k of the epoch that its batches drew; `read` says how steps went."""

    def __init__(self, cfg: Config, world: World, model: nn.Module, batches: Batches, device: str = ""):
        """`device`: whose kind of optimizer it is, if not of the rank's own."""
        self.batches = batches
        ddp = world.wrap(model, ddp=not cfg.reduction_shards)
        self.optimizer = optim.build(cfg, model, torch.device(device or world.device))
        self.rates = optim.schedule(cfg, batches.steps)
        self.record = StepRecord(batches)
        self.step = Step(cfg, world, ddp, self.optimizer, batches, self.record)
        self.step.warm_up()
        self.take: Any = self.step  # what takes a step: it, or what counts for itself
        self.state = State(cfg, world, model, self.optimizer, batches.steps, time.time(), self.step.average)
        self.sync = SyncPoint(cfg, world, self.record, self.state, self.rates)

    @property
    def done(self) -> int:
        return self.state.done

    def __call__(self, k: int) -> None:
        self.state.clock.start()
        self.batches.images.bring(k)
        self.take(k, self.rates[self.state.done])
        self.state.advance()

    def read(self, window: range) -> list[Trained]:
        return self.sync.read(window)

    def leave_gradient(self, k: int) -> None:
        """Leave the gradient of global batch k's mean loss in .grad, and the weights as they are."""
        kept: list[Any] = []
        with_update = self.optimizer.step
        self.optimizer.step = lambda *_: kept.extend(p.grad for p in self.step.trained)  # type: ignore[assignment]
        self.batches.images.bring(k)
        self.step(k, 0.0)
        self.optimizer.step = with_update  # type: ignore[method-assign]
        for parameter, gradient in zip(self.step.trained, kept, strict=True):
            parameter.grad = gradient
