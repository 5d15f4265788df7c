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

from fashion_ddp.distributed.world import World, entering_collective
from fashion_ddp.training.state import State
from fashion_ddp.training.step import Step, drop_gradient, random_state_kept

# DDP times its first ten passes with events that cannot be recorded (torch's notes on CUDA graphs).
WARM_UPS = 11
# How far a replayed step may be from an ordinary one, of what the step changes: kernels that add in any order differ in
# the last bits, which Adam's first update and half precision make larger.
TOLERANCE = 0.02

Launch = Callable[[], None]


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
        self.expected = 0, 0  # what the host knows to stand in `counters`
        self.launch: Launch = self.take  # kernel by kernel, or as one graph

    def __call__(self, k: int, lr: float) -> None:
        """Do what the step does. `k` must be the next batch of the run, and `lr` its learning rate."""
        self.stand_at(k)
        self.launch()

    def stand_at(self, k: int) -> None:
        """Let batch k of the epoch, and the run's next update, be next."""
        if (k, self.state.done) != self.expected:
            self.batch.fill_(k)
            self.update.fill_(self.state.done)
        self.expected = k + 1, self.state.done + 1

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
    if any(True for _ in step.ddp.buffers()):
        return "the model keeps statistics, as batch norm does, and a graph of it is not proven"
    if state.trained_to_the_end:
        return "no step is left to take"
    return None


def prove(counting: CountingStep, record: Callable[[CountingStep], Launch]) -> str | None:
    """Launch what `record` makes of an ordinary step from now on, if it does the same; otherwise return why not."""
    step, state, world = counting.step, counting.state, counting.step.world
    k = state.done % state.steps
    counting.stand_at(k)
    # Two, because a recorded step could have taken for fixed what is another for the next.
    compared = min(2, state.steps - k)
    with random_state_kept(world.device):
        before = _random_state(world)
        for _ in range(WARM_UPS):
            with undone(counting):
                counting.take()
        ordinary = _changes(counting, counting.take, compared)
        drawn = not torch.equal(before, _random_state(world))
    if drawn:
        return "the model draws random numbers, as dropout does, and a graph of it is not proven"
    recorded, problem = counting.take, None
    try:
        with undone(counting):
            recorded = record(counting)
    except RuntimeError as error:  # torch's word for what cannot be recorded, such as a read by the host
        problem = f"torch cannot record it ({str(error).strip().splitlines()[0]})"
        drop_gradient(step.trained)
    # Together: a rank that replays a graph would wait for one that has none.
    problem = _of_any(world, problem)
    if problem is None:
        pairs = zip(_changes(counting, recorded, compared), ordinary, strict=True)
        if not all(bool((ours - theirs).norm() <= TOLERANCE * theirs.norm()) for ours, theirs in pairs):
            problem = "recorded, it did not do what it does kernel by kernel"
        problem = _of_any(world, problem)
    if problem is None:
        counting.launch = recorded
    return problem


def _of_any(world: World, problem: str | None) -> str | None:
    """Return the problem of the first rank that has one."""
    return next((one for one in world.all_gather_object(problem) if one is not None), None)


@contextmanager
def undone(counting: CountingStep) -> Iterator[None]:
    """Within, steps may be taken; then everything is as it was, at the same places in memory, which a graph knows."""
    before = {tensor: tensor.detach().clone() for tensor in _changed(counting)}
    scaler = counting.step.scaler
    scale = scaler.state_dict() if scaler else {}
    yield
    with torch.no_grad():
        for tensor in _changed(counting):
            if tensor in before:
                tensor.copy_(before[tensor])
            else:
                tensor.zero_()  # an optimizer makes its state at the first step, and all of it begins at zero
    if scaler:
        scaler.load_state_dict(scale)


def _changed(counting: CountingStep) -> list[Tensor]:
    """Return all that a step changes on the device, but for fp16's scale."""
    step = counting.step
    kept = [value for state in step.optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return [*step.trained, *kept, step.record.losses, step.record.predicted, counting.counters]


def _changes(counting: CountingStep, take: Launch, times: int) -> list[Tensor]:
    """Return what so many steps change in the weights, in the record of losses and in the counters, as differences."""
    shown = [*counting.step.trained, counting.step.record.losses, counting.counters]
    with undone(counting):
        before = [tensor.detach().clone() for tensor in shown]
        for _ in range(times):
            take()
        return [(tensor.detach() - old).double() for tensor, old in zip(shown, before, strict=True)]


def _random_state(world: World) -> Tensor:
    """Return the state of the device's generator of random numbers."""
    return torch.cuda.get_rng_state(world.device) if world.device.type == "cuda" else torch.get_rng_state()


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
