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
from fashion_ddp.training.step import Step, random_numbers_kept

# DDP times its first ten passes with events that cannot be recorded (torch's notes on CUDA graphs).
WARM_UPS = 11
# How far a replayed step may be from an ordinary one, of what the step changes: kernels that add in any order differ in
# the last bits, which Adam's first update and half precision make larger.
TOLERANCE = 0.02

Launch = Callable[[], None]


def capture(step: Step) -> None:
    """Let `step.launch` be the step as one graph, or say in `step.eager` why it is launched kernel by kernel.

    A collective. Nothing of the run's state is changed; it must be in place, because the graph goes on from there.
    """
    step.eager = _unfit(step)
    if step.eager is None:
        step.eager = prove(step, _record)


def _unfit(step: Step) -> str | None:
    """Why no graph is tried; the same on every rank."""
    if step.world.device.type != "cuda":
        return "there are no CUDA graphs on a CPU"
    if not step.cfg.cuda_graph:
        return "--no-cuda-graph"
    if step.cfg.reduction_shards:
        return "reduction_shards gathers gradients outside of DDP"
    if any(True for _ in step.module.buffers()):
        return "the model keeps statistics, as batch norm does, and a graph of it is not proven"
    if step.done == len(step.lrs):
        return "no step is left to take"
    return None


def prove(step: Step, record: Callable[[Step], Launch]) -> str | None:
    """Let `step.launch` be what `record` makes of an ordinary step, if it does the same; otherwise say why not."""
    assert step.counters is not None
    k = step.done % step.batches.steps
    step.counters.stand_at(k, step.done)
    # Two, because a recorded step could have taken for fixed what is another for the next.
    compared = min(2, step.batches.steps - k)
    with random_numbers_kept(step.world.device):
        before = _generator(step.world)
        for _ in range(WARM_UPS):
            with undone(step):
                step.take()
        ordinary = _changes(step, step.take, compared)
        drawn = not torch.equal(before, _generator(step.world))
    if drawn:
        return "the model draws random numbers, as dropout does, and a graph of it is not proven"
    recorded, problem = step.take, None
    try:
        with undone(step):
            recorded = record(step)
    except RuntimeError as error:  # torch's word for what cannot be recorded, such as a read by the host
        problem = f"torch cannot record it ({str(error).strip().splitlines()[0]})"
        step.drop_gradient()
    # Together: a rank that replays a graph would wait for one that has none.
    problem = _of_any(step.world, problem)
    if problem is None:
        pairs = zip(_changes(step, recorded, compared), ordinary, strict=True)
        if not all(bool((ours - theirs).norm() <= TOLERANCE * theirs.norm()) for ours, theirs in pairs):
            problem = "recorded, it did not do what it does kernel by kernel"
        problem = _of_any(step.world, problem)
    if problem is None:
        step.launch = recorded
    return problem


def _of_any(world: World, problem: str | None) -> str | None:
    """The first rank's problem that has one."""
    return next((one for one in world.all_gather_object(problem) if one is not None), None)


@contextmanager
def undone(step: Step) -> Iterator[None]:
    """Steps may be taken within; then everything is as it was, at the same places in memory, which a graph knows."""
    before = {tensor: tensor.detach().clone() for tensor in _state(step)}
    scaler = step.scaler.state_dict() if step.scaler else {}
    yield
    with torch.no_grad():
        for tensor in _state(step):
            if tensor in before:
                tensor.copy_(before[tensor])
            else:
                tensor.zero_()  # an optimizer makes its state at the first step, and all of it begins at zero
    if step.scaler:
        step.scaler.load_state_dict(scaler)


def _state(step: Step) -> list[Tensor]:
    """All that a step changes on the device, but for fp16's scale."""
    assert step.counters is not None
    kept = [value for state in step.optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return [*step.trained, *kept, step.losses, step.predicted, step.counters.value]


def _changes(step: Step, take: Launch, times: int) -> list[Tensor]:
    """What so many steps change in the weights, in the table of losses and in the counters, each as the difference."""
    assert step.counters is not None
    shown = [*step.trained, step.losses, step.counters.value]
    with undone(step):
        before = [tensor.detach().clone() for tensor in shown]
        for _ in range(times):
            take()
        return [(tensor.detach() - old).double() for tensor, old in zip(shown, before, strict=True)]


def _generator(world: World) -> Tensor:
    """The state of the device's generator of random numbers."""
    return torch.cuda.get_rng_state(world.device) if world.device.type == "cuda" else torch.get_rng_state()


def _record(step: Step) -> Launch:
    """A step as a CUDA graph. Recording runs nothing."""
    graph = torch.cuda.CUDAGraph()
    step.world.graphs.append(graph)
    # Thread by thread: what other threads of the process do with the card, as NCCL's watchdog does, is their own.
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
        step.take()

    def launch() -> None:
        entering_collective()
        graph.replay()

    return launch
