"""A step as one CUDA graph: its kernels are recorded once, and launched as a whole from then on.

A step of a small network is dozens of kernels of a few microseconds each, and the host needs longer to launch them one
by one than the card to run them. The graph holds all of it: the batch, forward and backward pass, the all-reduce, the
optimizer's update and the record of losses. Not every step can be recorded, and that a recorded one does the same is
not taken on trust: it must repeat ordinary steps before it is used.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fashion_ddp.distributed.failures import nccl_words
from fashion_ddp.distributed.world import entering_collective
from fashion_ddp.training.state import State
from fashion_ddp.training.step import Step, random_state_kept

# DDP times its first ten passes with events that cannot be recorded (torch's notes on CUDA graphs).
WARM_UPS = 11
# How far what a recorded step changes may be from what an ordinary one changes, as a share of the change: kernels that
# add in any order differ in the last bits of the gradient, in half precision in the third digit.
TOLERANCE = 0.02
# And as a share of the change of all tensors of a kind: where the gradient is zero but for rounding, as that of a bias
# before a batch norm, its digits mean nothing.
FLOOR = 1e-4

Launch = Callable[[], None]
Changes = dict[str, list[Tensor]]


class CountingStep:
    """A step for which the card itself counts which batch and learning rate are next: the same list of kernels each
    time, so that one recording serves for all steps. What the host tells a kernel is fixed when it is recorded.

    The host knows what the card counts to, and tells it only where that differs, as at an epoch's beginning.
    """

    def __init__(self, step: Step, state: State, rates: list[float]):
        """`rates`: the learning rate of every update of the run."""
        self.step, self.state = step, state
        self.rates = step.record.losses.new_tensor(rates)
        self.lr = self.rates.new_zeros(())  # a scalar, always at the same place in memory
        self.counters = torch.zeros(2, dtype=torch.int64, device=self.rates.device)
        self.batch, self.update = self.counters.split(1)
        self.expected: tuple[int, int] | None = None  # what the host knows to stand in `counters`
        self.launch: Launch = self.take  # kernel by kernel, or as one graph

    def __call__(self, k: int, lr: float) -> None:
        """Do what the step does. `k` must be the next batch of the run, and `lr` its learning rate."""
        if (k, self.state.done) != self.expected:
            self.stand_at(k, self.state.done)
        self.launch()
        self.expected = k + 1, self.state.done + 1

    def stand_at(self, k: int, update: int) -> None:
        """Let batch k of the epoch and this update of the run be next."""
        self.batch.fill_(k)
        self.update.fill_(update)
        self.expected = None

    def take(self) -> None:
        """Take the step at which the card's counters stand. Nothing in it comes from the host."""
        self.step(self.batch, self.next_lr())
        self.counters += 1

    def next_lr(self) -> Tensor:
        """Return the learning rate of the next update."""
        return self.lr.copy_(self.rates.index_select(0, self.update).squeeze(0))


def capture(step: Step, state: State, rates: list[float]) -> tuple[Callable[[int, float], None], str | None]:
    """Return what does the same as `step`, on a card as one graph where that is possible; and why not, where not.

    A collective. Nothing of the run's state is changed; it must be in place, because the graph goes on from there.
    """
    if step.world.device.type != "cuda":
        return step, "there are no CUDA graphs on a CPU"
    counting = CountingStep(step, state, rates)
    return counting, _unfit(step, state) or prove(counting, _record)


def _unfit(step: Step, state: State) -> str | None:
    """Return why no graph is tried; the same on every rank."""
    if not step.cfg.cuda_graph:
        return "--no-cuda-graph"
    if step.cfg.reduction_shards:
        return "reduction_shards gathers gradients outside of DDP"
    if state.trained_to_the_end:
        return "no step is left to take"
    return None


def prove(counting: CountingStep, record: Callable[[CountingStep], Launch]) -> str | None:
    """Launch what `record` makes of an ordinary step from now on, if it does the same; otherwise return why not.

    A collective. Whatever happens, the run's state is as it was.
    """
    step, world = counting.step, counting.step.world
    with undone(counting), _scale_kept(step), random_state_kept(world.device):
        # Rates that move the weights, and two of them: a recorded step that took its own for fixed has to show.
        rate = counting.rates.max()
        counting.rates[::2] = rate
        counting.rates[1::2] = rate / 2
        if _draws(counting):
            return "the model draws random numbers, as dropout does, and a graph of it is not proven"
        recorded, problem = counting.take, None
        try:
            with undone(counting):
                recorded = record(counting)
        except RuntimeError as error:  # torch's word for what cannot be recorded, such as a read by the host
            problem = f"torch cannot record it ({_first_of(error)})"
        # Together: a rank that replays a graph would wait for one that has none.
        unrecorded = world.first_of_ranks(problem)
        problem = unrecorded or world.first_of_ranks(_compare(counting, recorded))
        if problem is None:
            counting.launch = recorded
            return None
        world.release_graphs()
        if unrecorded:
            step.start_over()
        return problem


def _draws(counting: CountingStep) -> bool:
    """Take ordinary steps until DDP does what it does from then on. Return whether they draw random numbers."""
    device = counting.step.world.device
    before = _random_state(device)
    for _ in range(WARM_UPS):
        # fp16 skips updates until its scale is low enough, and each of these steps lowers it: it is not undone here.
        with undone(counting):
            counting.stand_at(0, 0)
            counting.take()
    return not torch.equal(before, _random_state(device))


def _compare(counting: CountingStep, recorded: Launch) -> str | None:
    """Return where a recorded step differs from an ordinary one: in two steps, each begun from the same state, so that
    what the first one rounds does not grow in the second."""
    problems = []
    for update in range(min(2, counting.state.total_steps)):
        counting.stand_at(min(update, counting.state.steps - 1), update)
        problems.append(difference(_changes(counting, recorded), _changes(counting, counting.take)))
        counting.take()
    return next(filter(None, problems), None)


def difference(recorded: Changes, ordinary: Changes) -> str | None:
    """Return in which kind of tensor a recorded step's changes are not an ordinary one's; None where it does the same.

    What is compared is linear in the gradient, or nearly, so that rounding stays as small as it is there.
    """
    if not all(any(bool(change.any()) for change in ordinary[kind]) for kind in ("weights", "losses", "counters")):
        return "the steps that were to prove a graph of it moved nothing"
    for kind, changes in ordinary.items():
        floor = FLOOR * torch.stack([change.norm() for change in changes]).norm()
        for ours, theirs in zip(recorded[kind], changes, strict=True):
            if not bool((ours - theirs).norm() <= TOLERANCE * theirs.norm() + floor):
                return f"recorded, it changed {kind} in another way than kernel by kernel"
    return None


def _first_of(error: BaseException) -> str:
    """Return in one line what came first: a capture that an error breaks off ends with an error of its own."""
    while isinstance(error.__context__, RuntimeError):
        error = error.__context__
    return nccl_words(error) or str(error).strip().splitlines()[0]


@contextmanager
def undone(counting: CountingStep) -> Iterator[None]:
    """Within, steps may be taken; then everything is as it was, at the same places in memory, which a graph knows."""
    before = {tensor: tensor.detach().clone() for tensor in _changed(counting)}
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor in _changed(counting):
                if tensor in before:
                    tensor.copy_(before[tensor])
                else:
                    tensor.zero_()  # an optimizer makes its state at the first step, and all of it begins at zero


@contextmanager
def _scale_kept(step: Step) -> Iterator[None]:
    """Within, fp16's scale may change; then it is as it was."""
    before = step.scaler.state_dict() if step.scaler else {}
    try:
        yield
    finally:
        if step.scaler:
            step.scaler.load_state_dict(before)


def _proving(counting: CountingStep) -> Changes:
    """Return the tensors by which a step is judged, by kind."""
    step = counting.step
    kinds: Changes = {"weights": list(step.trained), "losses": [step.record.losses], "counters": [counting.counters]}
    kinds["statistics"] = list(step.ddp.buffers())
    if (average := step.average) is not None:
        kinds["averages"] = average.weights
        kinds["averaged statistics"] = [*average.buffers, average.updates]
    for kept in step.optimizer.state.values():
        for name, value in kept.items():
            if isinstance(value, Tensor):
                kinds.setdefault(name, []).append(value)
    return {kind: tensors for kind, tensors in kinds.items() if tensors}


def _changed(counting: CountingStep) -> list[Tensor]:
    """Return all that a step, or its proof, changes on the device, but for fp16's scale."""
    judged = [tensor for tensors in _proving(counting).values() for tensor in tensors]
    return [*judged, counting.step.record.predicted, counting.rates]


def _changes(counting: CountingStep, take: Launch) -> Changes:
    """Return what a step changes, as differences in float64; of weights as `_weighed`."""
    step = counting.step
    with undone(counting):
        before = {t: t.detach().clone() for tensors in _proving(counting).values() for t in tensors}
        take()
        kinds = _proving(counting)
        change = {t: t.detach().double() - before[t] for tensors in kinds.values() for t in tensors}
        changes = {kind: [change[tensor] for tensor in tensors] for kind, tensors in kinds.items()}
    moments = [step.optimizer.state.get(parameter, {}) for parameter in step.trained]
    muon = step.cfg.optimizer == "muon"
    for kind in {"weights", "averages"} & changes.keys():
        changes[kind] = [_weighed(one, kept, change, muon) for one, kept in zip(changes[kind], moments, strict=True)]
    return changes


def _weighed(weights: Tensor, kept: dict[str, Tensor], change: dict[Tensor, Tensor], muon: bool) -> Tensor:
    """Return a parameter's change times that of its moment.

    Adam moves a weight as far where its gradient is mere rounding as where it is large, and Muon a matrix along each of
    its singular directions. Where it is large counts: the product is |m| of a number, and of a matrix the root of m m',
    which rounding moves no further than m.
    """
    if "exp_avg" in kept:
        return weights * change[kept["exp_avg"]]
    if "momentum_buffer" in kept and muon:
        one, other = weights.flatten(1), change[kept["momentum_buffer"]].flatten(1)
        return one @ other.T if len(one) < len(one[0]) else one.T @ other
    return weights


def _random_state(device: torch.device) -> Tensor:
    """Return the state of the device's generator of random numbers."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _record(counting: CountingStep) -> Launch:
    """Record a step as a CUDA graph, which runs nothing."""
    graph = torch.cuda.CUDAGraph()
    counting.step.world.graphs.append(graph)
    # Thread by thread: what other threads of the process do with the card, as NCCL's watchdog does, is their own.
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
        counting.take()

    def launch() -> None:
        entering_collective()
        graph.replay()

    return launch
