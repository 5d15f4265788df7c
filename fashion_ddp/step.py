"""One optimizer update over a global batch: forward, backward, the exact mean of gradients over the ranks, update.

However the batch is cut (ranks, micro-batches, reduction shards), the gradient is that of the mean loss over the
global batch: a rank's loss is the weighted sum over its rows, divided by the rows of the global batch.
"""

import math
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fashion_ddp import optim
from fashion_ddp.batches import Batches
from fashion_ddp.clock import StepClock
from fashion_ddp.config import Config
from fashion_ddp.errors import TrainingFailed
from fashion_ddp.models import GlobalBatchNorm2d
from fashion_ddp.ranks import SyncPoint, World, arrive


class Trained(NamedTuple):
    """How one step went, over the global batch."""

    loss: float  # sum of the rows' losses
    hits: float  # rows predicted right
    rows: int
    lr: float


class Step:
    """`step(k)` trains on global batch k of the epoch that `batches` drew; `step.read(window)` says how it went.

    Nothing is read from the device between two reads: each step leaves its rows' losses and hits in a table.
    """

    def __init__(self, cfg: Config, world: World, model: nn.Module, batches: Batches):
        self.cfg, self.world, self.batches = cfg, world, batches
        self.module = model
        self.model = world.wrap(model, ddp=not cfg.reduction_shards)
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = optim.build(cfg, self.trained, world.device)
        self.scaler = world.accelerator.scaler  # fp16 only
        self.norms = [m for m in model.modules() if isinstance(m, GlobalBatchNorm2d)]
        self.sync = SyncPoint(world, cfg.checkpoint_every)
        self.clock = StepClock(world.device)
        self.lrs = optim.schedule(cfg, batches.steps)
        self.done = 0  # updates since the run began
        shape = batches.steps, batches.pieces, batches.rows
        self.losses = torch.zeros(shape, dtype=batches.dtype, device=world.device)
        self.hits = torch.zeros(shape, dtype=torch.bool, device=world.device)
        self._warm_up()

    def __call__(self, k: int) -> None:
        self.clock.start()
        for group in self.optimizer.param_groups:
            group["lr"] = self.lrs[self.done]
        self.leave_gradient(k)
        if self.cfg.clip_norm:
            if self.scaler is not None:
                self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.trained, self.cfg.clip_norm)
        if self.scaler is not None:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.done += 1
        self.clock.stop()

    def state(self) -> dict[str, Any]:
        """What the next step depends on, the same on every rank."""
        return {
            "done": self.done,
            "model": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict()["state"],
            "scaler": self.scaler.state_dict() if self.scaler else {},
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self.done = state["done"]
        self.module.load_state_dict(state["model"])
        groups = self.optimizer.state_dict()["param_groups"]  # ours, not the saved: `fused` depends on the device
        self.optimizer.load_state_dict({"state": state["optimizer"], "param_groups": groups})
        if self.scaler and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])

    def own_state(self) -> dict[str, Any]:
        """What of a rank may differ from the others': its generators, and the statistics of layers that keep theirs."""
        cuda = torch.cuda.get_rng_state(self.world.device) if self.world.device.type == "cuda" else None
        buffers = [b.detach().cpu() for b in self.module.buffers()]
        return {"generator": torch.get_rng_state(), "cuda_generator": cuda, "buffers": buffers}

    def restore_own(self, state: dict[str, Any]) -> None:
        """Go on from a rank's own state."""
        torch.set_rng_state(state["generator"])
        if state["cuda_generator"] is not None and self.world.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_generator"], self.world.device)
        for buffer, saved in zip(self.module.buffers(), state["buffers"], strict=True):
            buffer.copy_(saved)

    def leave_gradient(self, k: int) -> None:
        """Leave the gradient of global batch k's mean loss in .grad, the same on every rank."""
        if self.cfg.reduction_shards:
            self._gradient_by_shards(k)
        else:
            self._gradient_by_ddp(k)

    def _gradient_by_ddp(self, k: int) -> None:
        """DDP adds up over the ranks during the last piece's backward pass."""
        last = self.batches.pieces - 1
        for piece in range(last + 1):
            with nullcontext() if piece == last else self.world.accelerator.no_sync(self.model):
                loss = self._loss(k, piece)
                arrive()
                (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def _gradient_by_shards(self, k: int) -> None:
        """Every shard's gradient, gathered and added in the order of the shards."""
        mine = []
        for piece in range(self.batches.pieces):
            grads = torch.autograd.grad(self._loss(k, piece), self.trained, materialize_grads=True)
            mine.append(torch.cat([g.flatten() for g in grads]))
        total = self.world.gather(torch.stack(mine)).flatten(0, 1).sum(0)
        for parameter, grad in zip(self.trained, total.split([p.numel() for p in self.trained]), strict=True):
            parameter.grad = grad.view_as(parameter)

    def _loss(self, k: int, piece: int) -> Tensor:
        """This rank's part of the mean loss over global batch k, for one piece of its rows."""
        images, labels = self.batches.piece(k, piece)
        for norm in self.norms:
            norm.row_weights = self.batches.weights[k, piece]
        logits = self.model(images)
        losses = F.cross_entropy(logits, labels, reduction="none", label_smoothing=self.cfg.label_smoothing)
        self.losses[k, piece] = losses.detach()
        torch.eq(logits.detach().argmax(1), labels, out=self.hits[k, piece])
        return losses @ self.batches.loss_weights[k, piece]

    def _warm_up(self) -> None:
        """Throw-away backward passes whose effect is undone.

        DDP regroups its gradient buckets after a process's first pass, which changes the order of additions: a run
        that was stopped and continued would differ in the last bits from one that was not.
        """
        self.batches.draw(1)
        state = [b.clone() for b in self.module.buffers()]
        with torch.random.fork_rng(devices=[self.world.device] if self.world.device.type == "cuda" else []):
            for _ in range(2):
                self._loss(0, 0).backward()
        for buffer, before in zip(self.module.buffers(), state, strict=True):
            buffer.copy_(before)
        self.optimizer.zero_grad()

    def read(self, window: range) -> list[Trained]:
        """How each step of the window went. A sync point. Raises TrainingFailed, on every rank, where a loss is not
        finite."""
        steps = slice(window.start, window.stop)
        weights = self.batches.weights[steps].double()
        rows = [(table[steps] * weights).sum((1, 2)) for table in (self.losses, self.hits)]
        sums = self.sync(torch.stack(rows, dim=1))
        self.clock.read()
        first = self.done - len(window)
        for at, (loss, _) in enumerate(sums, start=first):
            if not math.isfinite(loss):
                raise TrainingFailed(
                    f"the loss is {loss} at step {at + 1}, where lr is {self.lrs[at]:g}: "
                    "training went off; try a smaller --lr, a warm-up or --clip-norm 1"
                )
        return [
            Trained(loss, hits, self.batches.in_batch[k], self.lrs[at])
            for at, (k, (loss, hits)) in enumerate(zip(window, sums, strict=True), start=first)
        ]
