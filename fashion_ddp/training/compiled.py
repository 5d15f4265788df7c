"""The forward and backward pass of a piece as one compiled function, on a CPU: what --compile does.

Most of a small model's step goes to finding out, operation by operation, what is to be done. Here the operations of one
pass are recorded (torch's make_fx) and compiled as a whole (its Inductor). Not every model can be recorded, and that
the compiled pass does the same is not taken on trust: it must repeat ordinary ones before it is used.
"""

import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel

from fashion_ddp.distributed.world import World, all_reduce
from fashion_ddp.training.batches import Piece, Position
from fashion_ddp.training.optim import PlainSGD
from fashion_ddp.training.step import Step, random_state_kept, set_gradient, take_gradient


class CompiledPass:
    """`compiled(k, n, piece)` does what a step's `ordinary_pass` does, by a function compiled for such pieces. Where
    nothing comes between gradient and update, and that is plain SGD, the function makes the update, too."""

    def __init__(self, step: Step, piece: Piece):
        """Record and compile the pass of a piece. Changes the model's weights and statistics, as a step does."""
        from torch._inductor import config as inductor
        from torch._inductor import standalone_compile
        from torch.fx.experimental.proxy_tensor import make_fx

        start = time.perf_counter()
        self.step, self.whole_batch = step, piece.whole_batch
        self.model = step.ddp.module if isinstance(step.ddp, DistributedDataParallel) else step.ddp
        # The optimizer changes the parameters where they lie: what the function is given is always as it stands.
        parameters = {name: one.detach() for name, one in self.model.named_parameters()}
        self.state = parameters | dict(self.model.named_buffers())
        gradients = self.compute_ordinarily(piece, step.trained)[2:]
        self.moved = [one for one, gradient in zip(step.trained, gradients, strict=True) if gradient is not None]
        names = {id(one): name for name, one in self.model.named_parameters()}
        self.names = [names[id(one)] for one in self.moved]
        plain = isinstance(step.optimizer, PlainSGD) and not step.cfg.clip_norm
        self.updates = plain and step.batches.groups == step.batches.pieces == 1
        self.rate = torch.zeros((), dtype=self.moved[0].dtype)
        self.given = [name for name, value in piece._asdict().items() if isinstance(value, Tensor)]
        self.fixed = {name: value for name, value in piece._asdict().items() if name not in self.given}
        inputs = self._inputs(piece)
        graph = make_fx(self._traced)(*inputs)
        with torch.no_grad(), inductor.patch(compile_threads=1):  # by itself it would leave processes behind
            self.function: Any = standalone_compile(graph, [*inputs], dynamic_shapes="from_example_inputs")
        self.seconds = time.perf_counter() - start  # that it took

    def __call__(self, k: Position, n: int, piece: Piece) -> None:
        """Add a piece's gradient to the parameters', or make the update, and record the piece. The step's last piece
        averages over the ranks."""
        step = self.step
        if step.norms and piece.whole_batch != self.whole_batch:  # the short batch at an epoch's end
            step.ordinary_pass(k, n, piece)
            return
        losses, predicted, *gradients = self.compute(piece, step.optimizer.param_groups[0]["lr"])
        step.record.write(k, n, losses, predicted)
        for parameter, gradient in zip(self.moved, gradients, strict=not self.updates):
            parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        if n == step.batches.pieces - 1 and step.world.size > 1 and not step.cfg.reduction_shards:
            average_gradients(step.world, self.moved)

    def compute(self, piece: Piece, rate: float) -> list[Tensor]:
        """Return a piece's losses [rows], predicted classes [rows], and the gradient of each parameter in `moved`;
        where this makes the update, subtract `rate` times the gradients instead."""
        self.rate.fill_(rate)
        with torch.no_grad():
            return self.function(*self._inputs(piece))

    def compute_ordinarily(self, piece: Piece, weights: Sequence[Tensor]) -> list[Any]:
        """Return the losses, predicted classes, and the gradients of `weights` (None of one that has no part in them),
        computed operation by operation."""
        return self._pass(self.model, piece, weights)

    def _inputs(self, piece: Piece) -> list[Tensor]:
        return [self.rate, *(getattr(piece, name) for name in self.given), *self.state.values()]

    def _traced(self, rate: Tensor, *tensors: Tensor) -> list[Tensor]:
        """Do what `compute` does."""
        given: dict[str, Any] = dict(zip(self.given, tensors, strict=False))
        state = dict(zip(self.state, tensors[len(self.given) :], strict=True))
        moved = {name: state[name].detach().requires_grad_() for name in self.names}
        forward = partial(functional_call, self.model, state | moved)
        losses, predicted, *gradients = self._pass(forward, Piece(**self.fixed, **given), list(moved.values()))
        if not self.updates:
            return [losses, predicted, *gradients]
        for name, gradient in zip(self.names, gradients, strict=True):
            state[name].sub_(rate * gradient)
        return [losses, predicted]

    def _pass(self, forward: Callable[[Tensor], Tensor], piece: Piece, weights: Sequence[Tensor]) -> list[Any]:
        logits, losses = self.step.forward(forward, piece)
        gradients = torch.autograd.grad([losses], weights, [piece.loss_weights], allow_unused=True)
        return [losses.detach(), logits.detach().argmax(1), *gradients]


def average_gradients(world: World, parameters: Sequence[nn.Parameter]) -> None:
    """Set the parameters' gradients to their mean over the ranks, as DDP does. A collective."""
    set_gradient(parameters, all_reduce(take_gradient(parameters)).div_(world.size))


def compile_pass(step: Step) -> str | None:
    """Let a step's passes be compiled ones from now on; return why not, where they cannot be.

    A collective. The run's state stays as it is.
    """
    problem = _unfit(step)
    if problem is None:
        step.batches.draw(1)
        step.batches.images.bring(0)
        with _undone(step):
            try:
                compiled = CompiledPass(step, step.batches.piece(0, 0))
                problem = _compare(compiled, step.batches.piece(0, 0))
            except Exception as error:  # noqa: BLE001 - whatever the compiler raises, ordinary passes do without it
                problem = f"torch cannot compile it ({str(error).strip().splitlines()[0]})"
    problem = step.world.first_of_ranks(problem)
    if problem is None:
        step.take_pass = compiled
    return problem


def _unfit(step: Step) -> str | None:
    """Return why it is not tried."""
    if step.norms and step.world.size > 1:
        return "batch norm speaks to the other ranks within a pass"
    if not shutil.which(compiler := os.environ.get("CXX", "g++")):
        return f"there is no {compiler}: install it, or name another C++ compiler in CXX"
    return None


def _compare(compiled: CompiledPass, piece: Piece) -> str | None:
    """Return in what the compiled pass differs from an ordinary one, with two pieces and two sets of weights: what of
    the first was recorded as if it were fixed has to show."""
    other = piece._replace(
        images=piece.images.flip(0), labels=piece.labels.roll(1), loss_weights=piece.loss_weights.flip(0) / 2
    )
    dtype = torch.bfloat16 if compiled.step.cfg.precision == "bf16" else torch.float32
    tolerance = torch.finfo(dtype).eps ** 0.5
    for one in (piece, other):
        before = torch.get_rng_state()
        ordinary, ours = (_results(compiled, one, compiled=which) for which in (False, True))
        if not torch.equal(torch.get_rng_state(), before):
            return "the model draws random numbers, as dropout does"
        if not all(_close(these, those, tolerance) for these, those in zip(ordinary, ours, strict=True)):
            return "compiled, it computed something else"
        for weights in compiled.moved:
            weights.detach().mul_(1.25)
    return None


def _results(function: CompiledPass, piece: Piece, compiled: bool) -> list[list[Tensor]]:
    """Return what a pass makes of a piece, compiled or not: losses, gradients and the model's statistics."""
    model, moved = function.model, function.moved
    kept = [*model.buffers(), *(one.detach() for one in moved)]
    before = [one.clone() for one in kept]
    losses, _, *gradients = function.compute(piece, 1.0) if compiled else function.compute_ordinarily(piece, moved)
    after = [one.clone() for one in kept]
    torch._foreach_copy_(kept, before)
    statistics = len(kept) - len(moved)
    if compiled and function.updates:
        gradients = [*torch._foreach_sub(before[statistics:], after[statistics:])]
    return [[losses], gradients, after[:statistics]]


def _close(ones: list[Tensor], others: list[Tensor], tolerance: float) -> bool:
    """Return whether tensors of a kind differ by rounding only: where all of one is rounding, as the gradient of a bias
    before batch norm, the others tell how much that is."""
    norms = [one.double().norm() for one in ones]
    floor = 0.01 * torch.stack(norms).norm() if norms else 0.0
    differences = ((one.double() - other.double()).norm() for one, other in zip(ones, others, strict=True))
    return all(bool(gap <= tolerance * (norm + floor)) for gap, norm in zip(differences, norms, strict=True))


@contextmanager
def _undone(step: Step) -> Iterator[None]:
    """Within, weights and statistics may change; then they are as they were, and so are the random numbers."""
    kept = [*step.trained, *step.ddp.buffers()]
    before = [one.detach().clone() for one in kept]
    with random_state_kept(step.world.device):
        yield
    with torch.no_grad():
        for one, value in zip(kept, before, strict=True):
            one.copy_(value)
