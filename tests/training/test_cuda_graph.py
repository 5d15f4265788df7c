"""A step for which the device counts, and what becomes of it when it is recorded.

A CPU has no graphs: here, ordinary steps stand in for recorded ones, right and wrong. Real ones: test_gpu.py.
"""

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import ranks
from torch import nn

from fashion_ddp.config.layers import make_config
from fashion_ddp.distributed.world import open_world
from fashion_ddp.models import architectures
from fashion_ddp.training import cuda_graph
from fashion_ddp.training.batches import Batches
from fashion_ddp.training.step import Step, Trained

IMAGES = np.random.default_rng(0).integers(0, 256, (70, 1, 28, 28), dtype=np.uint8)
LABELS = np.random.default_rng(1).integers(0, 10, 70)

CASES: list[dict[str, Any]] = [
    {"model": "linear"},
    {"model": "cnn", "optimizer": "momentum", "lr": 0.02, "schedule": "one_cycle", "precision": "bf16"},
    {"model": "cnn", "optimizer": "adam", "micro_batch": 3, "shift": 2, "flip": 0.5, "erase": 0.5},
    {"model": "mlp", "optimizer": "adamw", "lr": 0.001, "weight_decay": 0.1, "schedule": "cosine", "clip_norm": 0.5},
    {"model": "cnn", "batch_norm": True, "precision": "fp64"},
    {"model": "linear", "reduction_shards": 4, "label_smoothing": 0.1},
]


def each(given: dict[str, Any], *works: Callable[[Step], Any], model: nn.Module | None = None) -> list[Any]:
    """What each of `works` makes of a run's step. 70 images in batches of 16: the last has 6."""
    cfg = make_config({"device": "cpu", "threads": 1, "batch_size": 16, "epochs": 2} | given)
    with open_world(cfg) as world:
        nets = [model or architectures.build(cfg, (1, 28, 28), 10) for _ in works]
        steps = [Step(cfg, world, net, Batches(cfg, world, IMAGES, LABELS)) for net in nets]
        for step in steps:  # a card's kernels take float32 learning rates, and float64 ones where all is float64
            step.lrs = torch.tensor(step.lrs, dtype=step.losses.dtype).tolist()
        return [work(step) for work, step in zip(works, steps, strict=True)]


# --- Counting ---------------------------------------------------------------------------------------------------


def trained(step: Step) -> tuple[list[Trained], list[torch.Tensor]]:
    """Two epochs: how each step went, and the weights."""
    went = []
    for epoch in (1, 2):
        step.batches.draw(epoch)
        for k in range(step.batches.steps):
            step(k)
        went += step.read(range(step.batches.steps))
    return went, [p.detach() for p in step.trained]


def equal(one: Any, other: Any) -> bool:
    """Whether two runs went the same way to the same weights, bit for bit."""
    return bool(one[0] == other[0]) and all(torch.equal(a, b) for a, b in zip(one[1], other[1], strict=True))


def told_and_counted(given: dict[str, Any]) -> bool:
    def counted(step: Step) -> Any:
        step.count_on_device()
        return trained(step)

    return equal(*each(given, trained, counted))


@pytest.mark.quick
@pytest.mark.parametrize("given", CASES, ids=str)
def test_a_device_that_counts_takes_the_same_steps(given: dict[str, Any]) -> None:
    assert ranks(1, told_and_counted, given) == [True]


def stopped_and_continued(given: dict[str, Any]) -> bool:
    """Told for seven of ten steps, and counted for the rest by another process's device."""
    saved: list[Any] = []

    def save(step: Step) -> None:
        for done in range(7):
            if done % 5 == 0:
                step.batches.draw(1 + done // 5)
            step(done % 5)
        saved.append(copy.deepcopy(step.state()))

    def go_on(step: Step) -> Any:
        step.restore(saved[0])
        step.count_on_device()
        step.batches.draw(2)
        for k in (2, 3, 4):
            step(k)
        return step.read(range(2, 5)), [p.detach() for p in step.trained]

    (went, weights), _, (last, weights_too) = each(given, trained, save, go_on)
    return equal((went[7:], weights), (last, weights_too))


@pytest.mark.quick
def test_a_device_counts_on_from_where_a_run_was_stopped() -> None:
    assert ranks(1, stopped_and_continued, CASES[1]) == [True]


@pytest.mark.parametrize("given", CASES[1:3], ids=str)
def test_devices_of_two_ranks_that_count_take_the_same_steps(given: dict[str, Any]) -> None:
    assert ranks(2, told_and_counted, given) == [True, True]


# --- Proving ----------------------------------------------------------------------------------------------------


def state(step: Step) -> list[torch.Tensor]:
    """All that a run goes on from."""
    kept = [t.clone() for s in step.optimizer.state.values() for t in s.values()]
    return [*(p.detach().clone() for p in step.trained), *kept, torch.get_rng_state()]


def proven(given: dict[str, Any], record: Any, model: nn.Module | None = None) -> tuple[str | None, bool]:
    """Why a recorded step is refused after three steps of the run, and whether the proof left everything as it was."""

    def work(step: Step) -> tuple[str | None, bool]:
        step.count_on_device()
        step.batches.draw(1)
        for k in range(3):
            step(k)
        before = state(step)
        problem = cuda_graph.prove(step, record)
        same = all(torch.equal(a, b) for a, b in zip(before, state(step), strict=True))
        return problem, same and (problem is None) == (step.launch != step.take)

    [found] = each(given, work, model=model)
    return found  # type: ignore[no-any-return]


def another(step: Step) -> cuda_graph.Launch:
    """An equal step under another name."""
    return lambda: step.take()


@pytest.mark.quick
@pytest.mark.parametrize("given", CASES, ids=str)
def test_a_recorded_step_that_does_the_same_is_used_and_its_proof_leaves_no_trace(given: dict[str, Any]) -> None:
    assert ranks(1, proven, given, another) == [(None, True)]


def fresh(given: dict[str, Any]) -> bool:
    """Whether a proof before the first step changes nothing of the run that follows."""

    def after(step: Step) -> Any:
        step.count_on_device()
        assert cuda_graph.prove(step, another) is None
        return trained(step)

    return equal(*each(given, trained, after))


@pytest.mark.quick
@pytest.mark.parametrize("given", CASES[:4], ids=str)
def test_a_proof_before_the_first_step_changes_nothing_of_the_run(given: dict[str, Any]) -> None:
    assert ranks(1, fresh, given) == [True]


def idle(step: Step) -> cuda_graph.Launch:
    return lambda: None


def stuck(step: Step) -> cuda_graph.Launch:
    """Takes the same batch again and again."""
    assert step.counters is not None
    k = int(step.counters.batch)

    def launch() -> None:
        assert step.counters is not None
        step.counters.batch.fill_(k)
        step.take()

    return launch


def deaf(step: Step) -> cuda_graph.Launch:
    """Keeps the first learning rate."""
    assert step.counters is not None
    lr = step.counters.next_lr().item()

    def launch() -> None:
        assert step.counters is not None
        step._set_lr(lr)
        step._update(step.counters.batch)
        step.counters.count()

    return launch


@pytest.mark.quick
@pytest.mark.parametrize("record", [idle, stuck, deaf], ids=lambda f: f.__name__)
def test_a_recorded_step_that_does_something_else_is_refused(record: Any) -> None:
    given = {"model": "linear", "schedule": "one_cycle"}
    [(problem, untouched)] = ranks(1, proven, given, record)
    assert problem == "recorded, it did not do what it does kernel by kernel" and untouched


def alone(step: Step) -> cuda_graph.Launch:
    """Fails on the last rank, before it talks to the others."""
    if step.world.rank == step.world.size - 1:
        raise RuntimeError("operation not permitted when stream is capturing\nCompile with ...")
    return another(step)


@pytest.mark.parametrize("world_size", [1, 2])
def test_where_one_rank_cannot_record_none_does(world_size: int) -> None:
    found = ranks(world_size, proven, {"model": "linear"}, alone)
    why = "torch cannot record it (operation not permitted when stream is capturing)"
    assert found == [(why, True)] * world_size


def with_dropout() -> tuple[str | None, bool]:
    torch.manual_seed(0)
    return proven({"model": "linear"}, another, nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(784, 10)))


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
