"""One optimizer update over a global batch: forward, backward, the exact mean of gradients over the ranks, update.

However the batch is cut (ranks, micro-batches, reduction shards), the gradient is that of the mean loss over the
global batch: a rank's loss is the weighted sum over its rows, divided by the rows of the global batch.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fashion_ddp.config import Config
from fashion_ddp.distributed.world import World, entering_collective
from fashion_ddp.errors import TrainingFailed
from fashion_ddp.models.architectures import GlobalBatchNorm2d
from fashion_ddp.training import optim
from fashion_ddp.training.batches import Batches
from fashion_ddp.training.position import Counters, Position, at, put
from fashion_ddp.training.sync import SyncPoint
from fashion_ddp.training.timing import StepClock


class Trained(NamedTuple):
    """How one step went, over the global batch."""

    loss: float  # sum of the rows' losses
    hits: float  # rows predicted right
    rows: int
    lr: float


def random_numbers_kept(device: torch.device) -> AbstractContextManager[None]:
    """Random numbers may be drawn within; what follows draws as if none had been."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


class Step:
    """`step(k)` trains on global batch k of the epoch that `batches` drew; `step.read(window)` says how it went.

    Nothing is read from the device between two reads: each step leaves its rows' losses and predictions in a table.
    On a CPU the host tells each step which batch and learning rate are next; a card counts for itself, so that its
    step may be recorded (position.py, graph.py).
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
        self.losses = torch.zeros_like(batches.weights)
        self.predicted = torch.zeros_like(batches.targets)
        self.counters: Counters | None = None
        self.launch = self.take  # by a device that counts: kernel by kernel, or as one graph
        self.eager: str | None = "nothing was recorded"  # why kernel by kernel; None where it is one graph
        self._warm_up()
        if world.device.type == "cuda":
            self.count_on_device()

    def __call__(self, k: int) -> None:
        self.clock.start()
        if self.counters is None:
            self._set_lr(self.lrs[self.done])
            self._update(k)
        else:
            self.counters.stand_at(k, self.done)
            self.launch()
        self.done += 1
        self.clock.stop()

    def count_on_device(self) -> None:
        """From now on the device's own counters say which batch and learning rate are next."""
        self.counters = Counters(self.lrs, self.batches.weights)

    def take(self) -> None:
        """The step at which the device's counters stand. Nothing in it comes from the host."""
        assert self.counters is not None
        self._set_lr(self.counters.next_lr())
        self._update(self.counters.batch)
        self.counters.count()

    def _set_lr(self, lr: float | Tensor) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def _update(self, k: Position) -> None:
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
        self.drop_gradient()

    def drop_gradient(self) -> None:
        """As the optimizer's zero_grad does, which takes a 25th of a linear step's time for it."""
        for parameter in self.trained:
            parameter.grad = None

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

    def leave_gradient(self, k: Position) -> None:
        """Leave the gradient of global batch k's mean loss in .grad, the same on every rank."""
        if self.cfg.reduction_shards:
            self._gradient_by_shards(k)
        else:
            self._gradient_by_ddp(k)

    def _gradient_by_ddp(self, k: Position) -> None:
        """DDP adds up over the ranks during the last piece's backward pass."""
        last = self.batches.pieces - 1
        for piece in range(last + 1):
            with nullcontext() if piece == last else self.world.accelerator.no_sync(self.model):
                losses, weights = self._losses(k, piece)
                entering_collective()
                losses.backward(weights if self.scaler is None else self.scaler.scale(weights))

    def _gradient_by_shards(self, k: Position) -> None:
        """Every shard's gradient, gathered and added in the order of the shards."""
        mine = []
        for piece in range(self.batches.pieces):
            losses, weights = self._losses(k, piece)
            grads = torch.autograd.grad(losses, self.trained, weights, materialize_grads=True)
            mine.append(torch.cat([g.flatten() for g in grads]))
        total = self.world.all_gather(torch.stack(mine)).flatten(0, 1).sum(0)
        for parameter, grad in zip(self.trained, total.split([p.numel() for p in self.trained]), strict=True):
            parameter.grad = grad.view_as(parameter)

    def _losses(self, k: Position, piece: int) -> tuple[Tensor, Tensor]:
        """The losses of one piece of this rank's rows, and how much each counts in the mean over global batch k."""
        images, labels = self.batches.piece(k, piece)
        for norm in self.norms:
            norm.row_weights = at(self.batches.weights, k, piece)
        logits = self.model(images)
        losses = F.cross_entropy(logits, labels, reduction="none", label_smoothing=self.cfg.label_smoothing)
        put(self.losses, k, piece, losses.detach())
        put(self.predicted, k, piece, logits.detach().argmax(1))
        return losses, at(self.batches.loss_weights, k, piece)

    def _warm_up(self) -> None:
        """Throw-away backward passes whose effect is undone.

        DDP regroups its gradient buckets after a process's first pass, which changes the order of additions: a run
        that was stopped and continued would differ in the last bits from one that was not.
        """
        self.batches.draw(1)
        state = [b.clone() for b in self.module.buffers()]
        with random_numbers_kept(self.world.device):
            for _ in range(2):
                losses, weights = self._losses(0, 0)
                losses.backward(weights)
        for buffer, before in zip(self.module.buffers(), state, strict=True):
            buffer.copy_(before)
        self.drop_gradient()

    def read(self, window: range) -> list[Trained]:
        """How each step of the window went. A sync point. Raises TrainingFailed, on every rank, where a loss is not
        finite."""
        steps = slice(window.start, window.stop)
        weights = self.batches.weights[steps].double()
        right = self.predicted[steps] == self.batches.targets[steps]
        rows = [(table * weights).sum((1, 2)) for table in (self.losses[steps], right)]
        sums = self.sync(torch.stack(rows, dim=1))
        self.clock.read()
        first = self.done - len(window)
        for update, (loss, _) in enumerate(sums, start=first):
            if not math.isfinite(loss):
                raise TrainingFailed(
                    f"the loss is {loss} at step {update + 1}, where lr is {self.lrs[update]:g}: "
                    "training went off; try a smaller --lr, a warm-up or --clip-norm 1"
                )
        return [
            Trained(loss, hits, self.batches.in_batch[k], self.lrs[update])
            for update, (k, (loss, hits)) in enumerate(zip(window, sums, strict=True), start=first)
        ]
