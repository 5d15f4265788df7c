"""One update: what the warm-up leaves behind, clipping, and the end of a run that went off.

That an update is the tutorials', on any number of ranks and however a batch is cut: test_equal_on_any_ranks.py.
"""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ranks
from torch import nn
from trainer import Trainer

from fashion_ddp.config import Config
from fashion_ddp.config.layers import make_config
from fashion_ddp.distributed.world import open_world
from fashion_ddp.errors import TrainingFailed
from fashion_ddp.models import architectures
from fashion_ddp.models.batch_norm import GlobalBatchNorm2d
from fashion_ddp.training.batches import Batches
from fashion_ddp.training.sync import SyncPoint

IMAGES = np.random.default_rng(0).integers(0, 256, (64, 1, 8, 8), dtype=np.uint8)
LABELS = np.random.default_rng(1).integers(0, 10, 64)


def settings(**given: Any) -> Config:
    small = {"model": "linear", "device": "cpu", "threads": 1, "batch_size": 8, "epochs": 2, "precision": "fp64"}
    return make_config(small | given)


def noisy_model() -> nn.Module:
    """A model with buffers that each forward pass changes, and with random numbers of its own."""
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 3, 3), GlobalBatchNorm2d(3), nn.BatchNorm2d(3), nn.Dropout(), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(3 * 6 * 6, 10)).double()


# --- Warm-up ----------------------------------------------------------------------------------------------------


def before_and_after() -> list[bool]:
    with open_world(cfg := settings()) as world:
        model = noisy_model()
        batches = Batches(cfg, world, IMAGES, LABELS)
        torch.manual_seed(5)
        before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
        step = Trainer(cfg, world, model, batches)
        after = model.state_dict()
        return [
            all(torch.equal(after[name], before[name]) for name in before),
            torch.equal(torch.get_rng_state(), state),
            all(p.grad is None or not p.grad.any() for p in model.parameters()),
            not step.optimizer.state and step.done == 0 and step.state.clock.seconds == [],
        ]


@pytest.mark.parametrize("world_size", [1, 2])
def test_warm_up_leaves_nothing_behind(world_size: int) -> None:
    assert ranks(world_size, before_and_after) == [[True] * 4] * world_size


def noisy_losses() -> tuple[list[float], list[float]]:
    """Losses of some steps by Step, and by a loop without any warm-up, from the same random state."""
    with open_world(cfg := settings(shuffle=False)) as world:
        model = noisy_model()
        batches = Batches(cfg, world, IMAGES, LABELS)
        torch.manual_seed(5)
        step = Trainer(cfg, world, model, batches)
        for k in range(6):
            step(k)
        ours = [trained.loss / trained.rows for trained in step.read(range(6))]
    model = noisy_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=cfg.lr)
    torch.manual_seed(5)
    plain = []
    for x, y in zip(torch.from_numpy(IMAGES).split(8)[:6], torch.from_numpy(LABELS).split(8), strict=False):
        loss = F.cross_entropy(model(x.double() / 255), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        plain.append(loss.item())
    return ours, plain


def test_one_rank_draws_the_random_numbers_of_a_plain_loop() -> None:
    [(ours, plain)] = ranks(1, noisy_losses)
    assert ours == pytest.approx(plain, abs=1e-10)


# --- Updates ----------------------------------------------------------------------------------------------------


def weights_moved(clip_norm: float) -> tuple[float, list[torch.Tensor]]:
    """The norm of the first gradient, and the weights before and after each of three updates."""
    with open_world(cfg := settings(clip_norm=clip_norm, lr=0.5)) as world:
        model = architectures.build(cfg, (1, 8, 8), 10)
        step = Trainer(cfg, world, model, Batches(cfg, world, IMAGES, LABELS))
        step.leave_gradient(0)
        norm = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm().item()
        weights = [nn.utils.parameters_to_vector(model.parameters()).detach().clone()]
        step.optimizer.zero_grad()
        for k in range(3):
            step(k)
            weights.append(nn.utils.parameters_to_vector(model.parameters()).detach().clone())
        return norm, weights


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_gradient_is_clipped_by_its_norm(world_size: int) -> None:
    norm, free = ranks(world_size, weights_moved, 0.0)[0]
    assert (free[1] - free[0]).norm().item() == pytest.approx(0.5 * norm)
    _, clipped = ranks(world_size, weights_moved, norm / 10)[0]
    for before, after in pairwise(clipped):
        assert (after - before).norm().item() == pytest.approx(0.5 * norm / 10, rel=1e-4)
    direction = F.cosine_similarity(clipped[1] - clipped[0], free[1] - free[0], dim=0).item()
    assert direction == pytest.approx(1)
    _, untouched = ranks(world_size, weights_moved, norm * 100)[0]
    assert all(map(torch.equal, untouched, free))


def rates_used(**given: Any) -> tuple[list[float], list[float], int, int]:
    with open_world(cfg := settings(schedule="cosine", warmup_epochs=0.5, **given)) as world:
        model = architectures.build(cfg, (1, 8, 8), 10)
        batches = Batches(cfg, world, IMAGES, LABELS)
        step = Trainer(cfg, world, model, batches)
        used, told = [], []
        for epoch in (1, 2):
            batches.draw(epoch)
            for window in step.sync.windows(batches.steps):
                for k in window:
                    step(k)
                    used.append(step.optimizer.param_groups[0]["lr"])
                told += [trained.lr for trained in step.read(window)]
        return used, told, step.done, len(step.state.clock.seconds)


def test_each_update_takes_its_own_rate() -> None:
    [(used, told, done, timed)] = ranks(1, rates_used)
    expected = [0.1 * n / 4 for n in range(1, 5)] + [0.05 * (1 + np.cos(np.pi * n / 12)) for n in range(12)]
    assert used == pytest.approx(expected) and told == used and done == 16
    assert timed == 15  # the first is kept apart


# --- The end of a run that went off -------------------------------------------------------------------------------


def end(cfg: Config, window: int) -> tuple[str, int]:
    """What a run dies of, and how many updates it made before it noticed."""
    with open_world(cfg) as world:
        model = architectures.build(cfg, (1, 8, 8), 10)
        batches = Batches(cfg, world, IMAGES, LABELS)
        step = Trainer(cfg, world, model, batches)
        try:
            for start in range(0, batches.steps, window):
                for k in range(start, start + window):
                    step(k)
                step.read(range(start, start + window))
        except TrainingFailed as error:
            return str(error), step.done
    return "", step.done


def first_bad_step(lr: float) -> int:
    torch.manual_seed(42)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.Linear(10, 10)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    x, y = torch.from_numpy(IMAGES).double().split(8), torch.from_numpy(LABELS).split(8)
    for k in range(8):
        loss = F.cross_entropy(model(x[k] / 255), y[k])
        if not loss.isfinite():
            return k + 1
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    raise AssertionError("the loss stayed finite")


@pytest.mark.parametrize("window", [1, 8])
@pytest.mark.parametrize("given", [{}, {"micro_batch": 2}, {"reduction_shards": 2}], ids=str)
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_loss_that_is_not_finite_ends_every_rank(world_size: int, given: dict[str, int], window: int) -> None:
    ends = ranks(world_size, end, settings(lr=1e200, shuffle=False, **given), window)
    message, done = ends[0]
    bad = first_bad_step(1e200)
    assert 1 < bad < 8 and f"at step {bad}, where lr is 1e+200" in message and "--clip-norm" in message
    assert ends == [(message, done)] * world_size and done == (bad if window == 1 else 8)


SPANS = [(0, 9), (0, 9), (0, 300), (0, 1), (4, 9), (9, 9)]  # of an epoch's steps; a run may continue within it


def windows_seen() -> list[list[range]]:
    with open_world(cfg := settings()) as world:
        trainer = Trainer(cfg, world, architectures.build(cfg, (1, 8, 8), 10), Batches(cfg, world, IMAGES, LABELS))
        seen = []
        for seconds, (start, steps) in zip((0.0, 1e9, 0.01, 1.0, 1e9, 1.0), SPANS, strict=True):
            sync, windows = SyncPoint(cfg, world, trainer.record, trainer.state, trainer.rates, seconds), []
            for window in sync.windows(steps, start):
                windows.append(window)
                sync._reduce(torch.zeros(len(window), 2, dtype=torch.float64))
            seen.append(windows)
        return seen


def test_windows_hold_each_step_once() -> None:
    by_rank = ranks(2, windows_seen)
    assert by_rank[0] == by_rank[1]
    for windows, (start, steps) in zip(by_rank[0], SPANS, strict=True):
        assert [k for window in windows for k in window] == list(range(start, steps))
    assert len(by_rank[0][0]) == 9 and by_rank[0][1] == [range(1), range(1, 9)]
