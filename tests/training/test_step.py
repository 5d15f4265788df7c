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
from fashion_ddp.training.images import Part

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


def before_and_after() -> list[bool]:
    with open_world(cfg := settings()) as world:
        model = noisy_model()
        before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
        step = Trainer(cfg, world, model, Batches(cfg, world, Part(IMAGES, LABELS)))
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


def weights_moved(clip_norm: float) -> tuple[float, list[torch.Tensor]]:
    """The norm of the first gradient, and the weights before and after each of three updates."""
    with open_world(cfg := settings(clip_norm=clip_norm, lr=0.5)) as world:
        model = architectures.build(cfg, (1, 8, 8), 10)
        step = Trainer(cfg, world, model, Batches(cfg, world, Part(IMAGES, LABELS)))
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


def mixed(given: dict[str, Any]) -> list[tuple[torch.Tensor, ...]]:
    """Of each batch: the gradient, and what a plain formula gives: soft targets, and their mean cross entropy."""
    with open_world(cfg := settings(label_smoothing=0.1, batch_size=12, **given)) as world:
        model = architectures.build(cfg, (1, 8, 8), 10)
        step = Trainer(cfg, world, model, batches := Batches(cfg, world, Part(IMAGES, LABELS)))
        assert batches.partners is not None and batches.mixes is not None
        found = []
        for k in range(batches.steps):
            own, partners = (table[k][batches.weights[k] == 1] for table in (batches.index, batches.partners))
            share, blend, top, bottom, left, right = batches.mixes[k, 0].tolist()
            x, other = (torch.from_numpy(IMAGES).double()[rows] / 255 for rows in (own, partners))
            x = blend * x + (1 - blend) * other
            inside = slice(int(top), int(bottom)), slice(int(left), int(right))
            x[:, :, *inside] = other[:, :, *inside]
            one_hot = F.one_hot(torch.from_numpy(LABELS)).double()
            targets = share * one_hot[own] + (1 - share) * one_hot[partners]
            plain = torch.autograd.grad(
                F.cross_entropy(model(x), targets, label_smoothing=0.1), list(model.parameters())
            )
            step.leave_gradient(k)
            ours = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
            found.append((ours.clone(), torch.cat([gradient.flatten() for gradient in plain])))
            step.optimizer.zero_grad()
        return found


@pytest.mark.parametrize("given", [{"mixup": 1.0}, {"cutmix": 1.0}, {"mixup": 1.0, "cutmix": 1.0, "micro_batch": 5}])
def test_the_loss_of_mixed_images_is_that_of_mixed_targets(given: dict[str, Any]) -> None:
    [found] = ranks(1, mixed, given)
    assert len(found) == 6  # the last batch has 4 rows
    for ours, plain in found:
        torch.testing.assert_close(ours, plain, rtol=0, atol=1e-12)


def rates_used() -> tuple[list[float], list[float], int, int]:
    with open_world(cfg := settings(schedule="cosine", warmup_epochs=0.5)) as world:
        step = Trainer(cfg, world, architectures.build(cfg, (1, 8, 8), 10), Batches(cfg, world, Part(IMAGES, LABELS)))
        used, told = [], []
        for epoch in (1, 2):
            step.batches.draw(epoch)
            for window in step.sync.windows(step.batches.steps):
                for k in window:
                    step(k)
                    used.append(step.optimizer.param_groups[0]["lr"])
                told += [trained.lr for trained in step.read(window)]
        return used, told, step.done, len(step.state.clock.seconds)


def test_each_update_takes_its_own_rate() -> None:
    [(used, told, done, timed)] = ranks(1, rates_used)
    expected = [0.1 * n / 4 for n in range(1, 5)] + [0.05 * (1 + np.cos(np.pi * n / 12)) for n in range(12)]
    assert used == pytest.approx(expected) and told == used
    assert (done, timed) == (16, 15)  # the first is kept apart


def end(cfg: Config, window: int) -> tuple[str, int]:
    """What a run dies of, and how many updates it made before it noticed."""
    with open_world(cfg) as world:
        step = Trainer(cfg, world, architectures.build(cfg, (1, 8, 8), 10), Batches(cfg, world, Part(IMAGES, LABELS)))
        with pytest.raises(TrainingFailed) as died:
            for start in range(0, step.batches.steps, window):
                for k in range(start, start + window):
                    step(k)
                step.read(range(start, start + window))
        return str(died.value), step.done


@pytest.mark.parametrize("given", [{}, {"micro_batch": 2}, {"reduction_shards": 2}], ids=str)
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_loss_that_is_not_finite_ends_every_rank(world_size: int, given: dict[str, int]) -> None:
    cfg = settings(lr=1e200, shuffle=False, **given)
    [(message, bad)] = set(ranks(world_size, end, cfg, 1))  # looked at after each step
    assert 1 < bad < 8 and f"at step {bad}, where lr is 1e+200" in message and "--clip-norm" in message
    assert ranks(world_size, end, cfg, 8) == [(message, 8)] * world_size
