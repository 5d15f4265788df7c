"""One optimizer update over a global batch: learning rate, forward, loss, backward, clip, update.

However the batch is cut (ranks, micro-batches, reduction shards), the gradient is that of the mean loss over the
global batch: a rank's loss is the weighted sum over its rows, divided by the rows of the global batch.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fashion_ddp.config import Config
from fashion_ddp.distributed.world import World, entering_collective
from fashion_ddp.models.batch_norm import GlobalBatchNorm
from fashion_ddp.models.dropout import SampleDropout
from fashion_ddp.private import private
from fashion_ddp.training.batches import Batches, Piece, Position
from fashion_ddp.training.ema import Average
from fashion_ddp.training.sync import StepRecord


class Step:
    """`step(k, lr)` makes one update, on global batch k of the epoch that `batches` drew, with learning rate lr.

    It reads nothing from the device: losses and predictions go into `record`, which is read at the next sync point.
    On a card, k and lr may be tensors that the card counts by itself (cuda_graph.py).
    """

    def __init__(
        self,
        cfg: Config,
        world: World,
        ddp: nn.Module,
        optimizer: torch.optim.Optimizer,
        batches: Batches,
        record: StepRecord,
    ):
        """`ddp`: the model as `world.wrap` returns it. `optimizer`: it holds every parameter that is trained."""
        self.cfg, self.world, self.ddp, self.optimizer = cfg, world, ddp, optimizer
        self.batches, self.record = batches, record
        self.trained: list[nn.Parameter] = [p for group in optimizer.param_groups for p in group["params"]]
        self.average = Average(cfg.ema, self.trained, ddp) if cfg.ema else None
        self.scaler = world.accelerator.scaler  # fp16 only
        self.norms = [module for module in ddp.modules() if isinstance(module, GlobalBatchNorm)]
        self.dropouts = [module for module in ddp.modules() if isinstance(module, SampleDropout)]
        for number, dropout in enumerate(self.dropouts):
            dropout.number = number
        batches.keyed = bool(self.dropouts)
        # What takes piece n of batch k: `take_pass(k, n, piece)`. compiled.py has another one.
        self.take_pass: Callable[[Position, int, Piece], None] = self.ordinary_pass

    def __call__(self, k: Position, lr: float | Tensor) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr

        shards: list[Tensor] = []
        for n in range(self.batches.pieces):
            self.take_pass(k, n, self.batches.piece(k, n))
            if self.cfg.reduction_shards:
                shards.append(take_gradient(self.trained))
        if self.cfg.reduction_shards:
            add_shards(self.world, self.trained, shards)

        if self.cfg.clip_norm:
            if self.scaler is not None:
                self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.trained, self.cfg.clip_norm)
        if self.scaler is not None:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.step()
        drop_gradient(self.trained)
        if self.average is not None:
            self.average.update()

    def ordinary_pass(self, k: Position, n: int, piece: Piece) -> None:
        """Record a piece, and add its gradient to that of the pieces before: forward, loss, backward."""
        # DDP averages the gradients over the ranks during the backward pass of the last piece.
        with nullcontext() if n == self.batches.pieces - 1 else self.world.no_sync(self.ddp):
            logits, losses = self.forward(self.ddp, piece)
            self.record.write(k, n, losses.detach(), logits.detach().argmax(1))
            entering_collective()
            weights = piece.loss_weights if self.scaler is None else self.scaler.scale(piece.loss_weights)
            run_backward(losses, weights)

    def forward(self, model: Callable[[Tensor], Tensor], piece: Piece) -> tuple[Tensor, Tensor]:
        """Return a model's logits [rows, classes] for a piece, and the loss of each row [rows]."""
        self._tell_layers(piece)
        logits = model(piece.images)
        return logits, self._losses(logits, piece)

    def _tell_layers(self, piece: Piece) -> None:
        """Tell layers that look at whole rows which rows come next."""
        for norm in self.norms:
            norm.row_weights, norm.whole_batch = piece.weights, piece.whole_batch
        for dropout in self.dropouts:
            dropout.row_keys = piece.keys

    def _losses(self, logits: Tensor, piece: Piece) -> Tensor:
        """Return the loss of each row [rows]."""
        smoothing = self.cfg.label_smoothing
        losses = F.cross_entropy(logits, piece.labels, reduction="none", label_smoothing=smoothing)
        if piece.partner_labels is not None:
            others = F.cross_entropy(logits, piece.partner_labels, reduction="none", label_smoothing=smoothing)
            losses = piece.own_share * losses + (1 - piece.own_share) * others
        return losses

    def warm_up(self) -> None:
        """Make two backward passes and undo their effect.

        DDP regroups its gradient buckets after a process's first pass, which changes the order of additions: without
        this a run that was stopped and continued would differ in the last bits from one that was not.
        """
        self.batches.draw(1)
        self.batches.images.bring(0)
        buffers = [buffer.clone() for buffer in self.ddp.buffers()]
        piece = self.batches.piece(0, 0)
        with random_state_kept(self.world.device):
            for _ in range(2):
                run_backward(self.forward(self.ddp, piece)[1], piece.loss_weights)
        for buffer, before in zip(self.ddp.buffers(), buffers, strict=True):
            buffer.copy_(before)
        drop_gradient(self.trained)

    def start_over(self) -> None:
        """Be ready for the next step after one that an error broke off. A collective.

        Such a step leaves DDP in the midst of a reduction, and fp16's scaler in the midst of an update.
        """
        drop_gradient(self.trained)
        if self.scaler is not None:
            private(self.scaler, "_per_optimizer_states").clear()
        if isinstance(self.ddp, DistributedDataParallel):
            private(self.ddp.reducer, "_reset_state")()  # torch's own way; it groups the buckets anew
        self.warm_up()


def run_backward(losses: Tensor, weights: Tensor) -> None:
    """Do what `losses.backward(weights)` does, without its checks, which take a tenth of a linear step. Where torch has
    not what it then calls itself, call `backward`."""
    engine = getattr(torch.autograd.Variable, "_execution_engine", None)  # seen in torch 2.10 to 2.15
    if engine is None:
        losses.backward(weights)
    else:
        engine.run_backward((losses,), (weights,), False, False, (), allow_unreachable=True, accumulate_grad=True)


def take_gradient(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Return the parameters' gradients in one vector, zeros for those without one, and clear them."""
    gradient = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
    drop_gradient(parameters)
    return gradient


def set_gradient(parameters: Sequence[nn.Parameter], gradient: Tensor) -> None:
    """Set the parameters' gradients to what `take_gradient` would then return."""
    for parameter, own in zip(parameters, gradient.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = own.view_as(parameter)


def add_shards(world: World, parameters: Sequence[nn.Parameter], shards: list[Tensor]) -> None:
    """Set the parameters' gradients to the sum of all ranks' shards, added in the order of the shards: the same bits
    on any number of ranks. `shards`: this rank's gradients, one vector each."""
    set_gradient(parameters, world.all_gather(torch.stack(shards)).flatten(0, 1).sum(0))


def drop_gradient(parameters: Sequence[nn.Parameter]) -> None:
    """Clear the gradients, as the optimizer's zero_grad does, which takes a 25th of a linear step's time for it."""
    for parameter in parameters:
        parameter.grad = None


def random_state_kept(device: torch.device) -> AbstractContextManager[None]:
    """Let random numbers be drawn within, without a trace: afterwards the generators are as they were."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
