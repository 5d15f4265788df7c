"""A step for which the device counts, what becomes of it when it is recorded, and which recorded steps are refused.

A CPU has no CUDA graphs: cpu_graph.py records and replays a step's operations there. Real graphs: test_gpu.py.
"""

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import cpu_graph
import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import ranks
from torch import nn
from trainer import Trainer

from fashion_ddp.config.layers import make_config
from fashion_ddp.distributed.world import open_world
from fashion_ddp.models import architectures
from fashion_ddp.models.dropout import SampleDropout
from fashion_ddp.training import cuda_graph
from fashion_ddp.training.batches import Batches
from fashion_ddp.training.cuda_graph import CountingStep, Launch
from fashion_ddp.training.images import Part
from fashion_ddp.training.sync import Trained

IMAGES = np.random.default_rng(0).integers(0, 256, (70, 1, 28, 28), dtype=np.uint8)
LABELS = np.random.default_rng(1).integers(0, 10, 70)


def dropping(shape: tuple[int, int, int], classes: int) -> nn.Module:
    """A user's model with dropout by image."""
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 32), nn.ReLU(), SampleDropout(0.5), nn.Linear(32, classes))


CASES: list[dict[str, Any]] = [
    {"model": "linear"},
    {"model": "mlp", "optimizer": "momentum", "lr": 0.02, "schedule": "one_cycle", "precision": "bf16"},
    {"model": "cnn", "optimizer": "adam", "micro_batch": 3, "shift": 2, "flip": 0.5, "erase": 0.5, "mixup": 0.5},
    {"model": "mlp", "optimizer": "adamw", "lr": 0.001, "weight_decay": 0.1, "schedule": "cosine", "clip_norm": 0.5},
    {"model": "cnn", "batch_norm": True, "precision": "fp64", "ema": 0.9},
    {"model": "relu", "precision": "fp16", "optimizer": "momentum", "lr": 0.02, "clip_norm": 1.0},
    {"model": "test_cuda_graph:dropping", "alternating_flip": True, "cutout": 9, "mixup": 0.5, "cutmix": 1.0},
    # adam_lr is lr / 4: a ratio that the host and the device multiply by to the same bits
    {"model": "cnn", "optimizer": "muon", "lr": 0.016, "weight_decay": 0.1, "schedule": "linear", "ema": 0.9},
]
RESNET = {"model": "torchvision:resnet18", "optimizer": "momentum", "lr": 0.02, "batch_size": 35}
SHARDS = {"model": "linear", "reduction_shards": 4, "label_smoothing": 0.1}


def each(given: dict[str, Any], *works: Callable[[Trainer], Any], model: nn.Module | None = None) -> list[Any]:
    """What each of `works` makes of a run's step, with the optimizer that a card gets. 70 images in batches of 16: the
    last has 6."""
    fp16 = given.get("precision") == "fp16"  # a CPU has its scaler only
    given = given | ({"precision": "fp32"} if fp16 else {})
    cfg = make_config({"device": "cpu", "threads": 1, "batch_size": 16, "epochs": 2} | given)
    with open_world(cfg) as world:
        if fp16:
            world.accelerator.scaler = torch.amp.GradScaler("cpu")
        nets = [model or architectures.build(cfg, (1, 28, 28), 10) for _ in works]
        steps = [Trainer(cfg, world, net, Batches(cfg, world, Part(IMAGES, LABELS)), "cuda") for net in nets]
        for step in steps:
            step.batches.alone = False  # as on a card, where the host does not know which rows a step takes
        for step in steps:  # a card's kernels take float32 learning rates, and float64 ones where all is float64
            step.rates[:] = torch.tensor(step.rates, dtype=step.record.losses.dtype).tolist()
        return [work(step) for work, step in zip(works, steps, strict=True)]


# --- Counting and replaying -------------------------------------------------------------------------------------


def count(trainer: Trainer) -> CountingStep:
    """Let the device count for itself from now on."""
    trainer.take = CountingStep(trainer.step, trainer.state, trainer.rates)
    return trainer.take


def replay(trainer: Trainer) -> None:
    """Let each step be the replay of a recorded one from now on."""
    assert cuda_graph.prove(count(trainer), cpu_graph.record) is None


def trained(step: Trainer) -> tuple[list[Trained], list[torch.Tensor]]:
    """Two epochs: how each step went, and all that the run goes on from."""
    went = []
    for epoch in (1, 2):
        step.batches.draw(epoch)
        for k in range(step.batches.steps):
            step(k)
        went += step.read(range(step.batches.steps))
    return went, state(step)


def state(step: Trainer) -> list[torch.Tensor]:
    """All that a run goes on from."""
    kept = [t.clone() for s in step.optimizer.state.values() for t in s.values()]
    kept += [b.clone() for b in step.step.ddp.buffers()]
    if (average := step.step.average) is not None:
        kept += [t.clone() for t in (average.updates, *average.weights, *average.buffers)]
    return [*(p.detach().clone() for p in step.step.trained), *kept, torch.get_rng_state()]


def equal(one: Any, other: Any) -> bool:
    """Whether two runs went the same way to the same state, bit for bit."""
    return bool(one[0] == other[0]) and all(torch.equal(a, b) for a, b in zip(one[1], other[1], strict=True))


def told_and_replayed(given: dict[str, Any]) -> bool:
    def replayed(step: Trainer) -> Any:
        replay(step)
        return trained(step)

    return equal(*each(given, trained, replayed))


QUICK = [pytest.param(case, marks=pytest.mark.quick) for case in CASES]


@pytest.mark.parametrize("given", [*QUICK, pytest.param(RESNET, marks=pytest.mark.slow)], ids=str)
def test_a_step_recorded_before_the_first_and_replayed_is_the_ordinary_step(given: dict[str, Any]) -> None:
    assert ranks(1, told_and_replayed, given) == [True]


@pytest.mark.parametrize("given", [CASES[2], CASES[4]], ids=str)
def test_replays_on_two_ranks_are_the_ordinary_steps(given: dict[str, Any]) -> None:
    assert ranks(2, told_and_replayed, given) == [True, True]


def told_and_counted(given: dict[str, Any]) -> bool:
    def counted(step: Trainer) -> Any:
        count(step)
        return trained(step)

    return equal(*each(given, trained, counted))


@pytest.mark.quick
def test_a_step_that_is_not_recorded_counts_for_itself_all_the_same() -> None:
    assert ranks(1, told_and_counted, SHARDS) == [True]


def stopped_and_continued(given: dict[str, Any]) -> bool:
    """Told for seven of ten steps, and the rest replayed by another process's device."""
    saved: list[Any] = []

    def save(step: Trainer) -> None:
        for done in range(7):
            if done % 5 == 0:
                step.batches.draw(1 + done // 5)
            step(done % 5)
        saved.append(copy.deepcopy(step.state.saved([step.state.of_this_rank()])))

    def go_on(step: Trainer) -> Any:
        step.state.restore(saved[0], 0)
        replay(step)
        step.batches.draw(2)
        for k in (2, 3, 4):
            step(k)
        return step.read(range(2, 5)), state(step)

    (went, reached), _, (last, reached_too) = each(given, trained, save, go_on)
    return equal((went[7:], reached), (last, reached_too))


@pytest.mark.quick
@pytest.mark.parametrize("given", [*CASES[1:3], CASES[7]], ids=str)
def test_replays_go_on_from_where_a_run_was_stopped(given: dict[str, Any]) -> None:
    assert ranks(1, stopped_and_continued, given) == [True]


# --- Proving ----------------------------------------------------------------------------------------------------


def proven(given: dict[str, Any], record: Any, model: nn.Module | None = None) -> tuple[str | None, bool]:
    """Why a recorded step is refused after three steps of the run, and whether the proof left everything as it was."""

    def work(step: Trainer) -> tuple[str | None, bool]:
        counting = count(step)
        step.batches.draw(1)
        for k in range(3):
            step(k)
        before = state(step)
        problem = cuda_graph.prove(counting, record)
        same = all(torch.equal(a, b) for a, b in zip(before, state(step), strict=True))
        return problem, same and (problem is None) == (counting.launch != counting.take)

    [found] = each(given, work, model=model)
    return found  # type: ignore[no-any-return]


@pytest.mark.quick
@pytest.mark.parametrize("given", CASES, ids=str)
def test_the_proof_of_a_recorded_step_leaves_no_trace(given: dict[str, Any]) -> None:
    assert ranks(1, proven, given, cpu_graph.record) == [(None, True)]


def wrong(counting: CountingStep, change: Callable[[torch.Tensor], torch.Tensor], only: int | None = None) -> Launch:
    """A step whose gradients are changed, or that of one parameter only."""
    parameters = counting.step.trained if only is None else [counting.step.trained[only]]

    def launch() -> None:
        hooks = [parameter.register_hook(change) for parameter in parameters]
        counting.take()
        for hook in hooks:
            hook.remove()

    return launch


def noisy(size: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """Add noise to a gradient, as a share of its size, as kernels do that add in any order."""
    draws = torch.Generator().manual_seed(0)

    def change(gradient: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(gradient.shape, generator=draws, dtype=gradient.dtype)
        return gradient + size * gradient.norm() / gradient.numel() ** 0.5 * noise

    return change


def judged(given: dict[str, Any], noise: float, factor: float = 1.0, only: int | None = None) -> str | None:
    """What the proof says of a step whose gradients have noise, times a factor."""
    add = noisy(noise)
    return proven(given, lambda counting: wrong(counting, lambda gradient: factor * add(gradient), only))[0]


# The tutorials' cnn under Adam, whose updates turn noise of 1e-7 into an eighth of their size, and others.
NOISY = [{"model": "cnn", "recipe": "blog", "optimizer": "adam", "lr": 0.001}, CASES[1], *CASES[3:5], CASES[7]]


@pytest.mark.quick
@pytest.mark.parametrize("noise", [1e-7, 1e-4])
@pytest.mark.parametrize("given", NOISY, ids=str)
def test_rounding_is_no_reason_to_refuse(given: dict[str, Any], noise: float) -> None:
    assert ranks(1, judged, given, noise) == [None]


@pytest.mark.quick
def test_nor_is_what_muon_makes_of_it() -> None:
    # Of 256 singular directions 16 images leave 240 to rounding, which muon raises 485-fold.
    wide = {"model": "mlp", "hidden_units": 256, "optimizer": "muon", "lr": 0.02, "ema": 0.9}
    assert ranks(1, judged, wide, 1e-3) == [None]


@pytest.mark.quick
@pytest.mark.parametrize("only", [0, -1], ids=["first weights", "last bias"])
@pytest.mark.parametrize("given", NOISY, ids=str)
def test_a_wrong_gradient_of_one_layer_is_refused(given: dict[str, Any], only: int) -> None:
    [problem] = ranks(1, judged, given, 1e-4, 1.1, only)
    assert problem is not None and "recorded, it changed" in problem


def idle(counting: CountingStep) -> Launch:
    return lambda: None


def stuck(counting: CountingStep) -> Launch:
    """Takes the same batch again and again: its number came from the host."""
    graph = cpu_graph.CpuGraph()
    with graph:
        counting.step(torch.tensor([0]), counting.next_lr())
        counting.counters += 1
    return graph.replay


def deaf(counting: CountingStep) -> Launch:
    """Keeps the learning rate that the host gave it."""
    lr = counting.rates[0].clone()
    graph = cpu_graph.CpuGraph()
    with graph:
        counting.step(counting.batch, lr)
        counting.counters += 1
    return graph.replay


@pytest.mark.quick
@pytest.mark.parametrize("optimizer", ["sgd", "adam", "muon"])
@pytest.mark.parametrize("record", [idle, stuck, deaf], ids=lambda f: f.__name__)
def test_a_recorded_step_that_does_something_else_is_refused(record: Any, optimizer: str) -> None:
    [(problem, untouched)] = ranks(1, proven, {"model": "linear", "optimizer": optimizer, "lr": 0.01}, record)
    assert problem is not None and problem.startswith("recorded, it changed ") and untouched


def curious(counting: CountingStep) -> Launch:
    """Reads which batch is next."""
    with cpu_graph.CpuGraph():
        counting.step(int(counting.batch), counting.next_lr())
    raise AssertionError


def frozen_in_time() -> tuple[str | None, bool]:
    """A model whose loss nothing moves."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    model[1].weight.register_hook(torch.zeros_like)
    model[1].bias.register_hook(torch.zeros_like)
    return proven({"model": "linear"}, cpu_graph.record, model)


@pytest.mark.quick
def test_a_proof_in_which_nothing_moves_proves_nothing() -> None:
    assert ranks(1, frozen_in_time) == [("the steps that were to prove a graph of it moved nothing", True)]


class Torn(cpu_graph.CpuGraph):
    """A recording that fails where the ranks' gradients meet, within the backward pass."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            raise RuntimeError("operation not permitted when stream is capturing\nCompile with ...")
        return super().__torch_dispatch__(func, types, args, kwargs)


def torn(counting: CountingStep) -> Launch:
    """Fails on the last rank."""
    world = counting.step.world
    if world.rank < world.size - 1:
        return cpu_graph.record(counting)
    with Torn():
        counting.take()
    raise AssertionError


WHY = "torch cannot record it (operation not permitted when stream is capturing)"


def trained_all_the_same(given: dict[str, Any]) -> tuple[bool, bool]:
    """Whether a failed recording is told, and the run takes ordinary steps from then on."""
    told = []

    def after(step: Trainer) -> Any:
        told.append(cuda_graph.prove(count(step), torn))
        return trained(step)

    same = equal(*each(given, trained, after))
    return told == [WHY], same


@pytest.mark.parametrize("given", [CASES[2], CASES[5]], ids=str)
@pytest.mark.parametrize("world_size", [1, 2])
def test_where_one_rank_cannot_record_all_go_on_kernel_by_kernel(world_size: int, given: dict[str, Any]) -> None:
    assert ranks(world_size, trained_all_the_same, given) == [(True, True)] * world_size


@pytest.mark.quick
def test_a_step_whose_host_reads_from_the_device_is_not_recorded() -> None:
    assert ranks(1, proven, {"model": "linear"}, curious) == [(WHY, True)]


def with_dropout() -> tuple[str | None, bool]:
    torch.manual_seed(0)
    return proven({"model": "linear"}, cpu_graph.record, nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(784, 10)))


@pytest.mark.quick
def test_a_model_that_draws_random_numbers_is_not_recorded() -> None:
    [(problem, untouched)] = ranks(1, with_dropout)
    assert problem is not None and "draws random numbers" in problem and untouched


# --- Release ----------------------------------------------------------------------------------------------------


class Recorded:
    """Stands for a graph; notes whether the ranks are still connected when it is let go."""

    def __init__(self) -> None:
        self.released: list[bool] = []

    def reset(self) -> None:
        self.released.append(dist.is_initialized())


def released(failing: bool) -> list[bool]:
    graph = Recorded()
    with contextlib.suppress(ZeroDivisionError), open_world(make_config({"device": "cpu", "threads": 1})) as world:
        world.graphs.append(graph)  # type: ignore[arg-type]
        if failing:
            raise ZeroDivisionError
    return graph.released


@pytest.mark.parametrize("failing", [False, True])
def test_graphs_are_let_go_before_the_ranks_part(failing: bool) -> None:
    # NCCL would wait for them forever: https://github.com/pytorch/pytorch/issues/115388
    assert ranks(2, released, failing) == [[True], [True]]
