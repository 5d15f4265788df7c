"""Optimizers and schedules, beside torch's own."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from fashion_ddp.config.layers import make_config
from fashion_ddp.training import optim

pytestmark = pytest.mark.quick

CPU = torch.device("cpu")
ADAM = {"betas": (0.9, 0.999), "eps": 1e-8, "amsgrad": False}


@pytest.mark.parametrize("decay", [0.0, 0.01])
@pytest.mark.parametrize(
    ("name", "kind", "settings"),
    [
        ("sgd", torch.optim.SGD, {"momentum": 0.0, "nesterov": False, "dampening": 0}),
        ("momentum", torch.optim.SGD, {"momentum": 0.9, "nesterov": False, "dampening": 0}),
        ("adam", torch.optim.Adam, ADAM),
        ("adamw", torch.optim.AdamW, ADAM),
    ],
)
def test_optimizers_by_name(name: str, kind: type, settings: dict[str, Any], decay: float) -> None:
    cfg = make_config({"optimizer": name, "lr": 0.25, "weight_decay": decay, "batch_size": 512, "lr_scaling": "sqrt"})
    optimizer = optim.build(cfg, nn.Linear(2, 3), CPU)
    plain = name == "sgd" and not decay  # then it is ours
    assert type(optimizer) is (optim.PlainSGD if plain else kind) and isinstance(optimizer, kind)
    assert len(optimizer.param_groups[0]["params"]) == 2
    expected = settings | {"lr": 0.5, "weight_decay": decay}
    assert {key: optimizer.param_groups[0][key] for key in expected} == expected


def test_plain_sgd_gives_the_bits_of_torchs_and_leaves_what_has_no_gradient() -> None:
    ours, torchs = (nn.Linear(7, 5) for _ in range(2))
    torchs.load_state_dict(ours.state_dict())
    for net, kind in ((ours, optim.PlainSGD), (torchs, torch.optim.SGD)):
        optimizer = kind(net.parameters(), lr=0.1)
        for seed, rate in enumerate((0.1, 0.3)):
            optimizer.param_groups[0]["lr"] = rate
            net.weight.grad = torch.rand(5, 7, generator=torch.Generator().manual_seed(seed))
            optimizer.step()
    assert torch.equal(ours.weight, torchs.weight) and torch.equal(ours.bias, torchs.bias)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_momentum_as_it_is_given(device: str) -> None:
    cfg = make_config({"optimizer": "momentum", "lr": 0.25, "momentum": 0.8, "nesterov": True})
    [group] = optim.build(cfg, nn.Linear(2, 3), torch.device(device)).param_groups
    assert (group["momentum"], group["nesterov"], group["dampening"]) == (0.8, True, 0)


Schedule = Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler]


def torchs(schedule: Schedule, total: int) -> list[float]:
    """The learning rate of each update by one of torch's schedules, for a peak of 1."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = schedule(optimizer)
    rates = []
    for _ in range(total):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if len(rates) < total:
            scheduler.step()
    return rates


def ours(name: str, total: int, warmup: float = 0) -> list[float]:
    return [optim.factor(name, step, total, warmup) for step in range(total)]


@pytest.mark.parametrize("total", [1, 2, 3, 10, 1407])
def test_one_cycle_cosine_and_linear_are_torchs(total: int) -> None:
    cycle = torchs(lambda o: lr_scheduler.OneCycleLR(o, max_lr=1.0, total_steps=total, cycle_momentum=False), total)
    assert ours("one_cycle", total) == pytest.approx(cycle, rel=1e-9, abs=1e-15)
    cosine = torchs(lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=total), total)
    assert ours("cosine", total) == pytest.approx(cosine, rel=1e-9, abs=1e-12)
    line = torchs(lambda o: lr_scheduler.LinearLR(o, start_factor=1.0, end_factor=0.0, total_iters=total), total)
    assert ours("linear", total) == pytest.approx(line, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("warmup", [2, 5, 60, 99])
def test_warm_up_is_torchs(warmup: int) -> None:
    def rise(optimizer: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
        return lr_scheduler.LinearLR(optimizer, start_factor=1 / warmup, total_iters=warmup - 1)

    def rise_and_fall(optimizer: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
        fall = lr_scheduler.CosineAnnealingLR(optimizer, T_max=100 - warmup)
        return lr_scheduler.SequentialLR(optimizer, [rise(optimizer), fall], milestones=[warmup])

    def rise_and_slope(optimizer: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
        slope = lr_scheduler.LinearLR(optimizer, start_factor=1.0, end_factor=0.0, total_iters=100 - warmup)
        return lr_scheduler.SequentialLR(optimizer, [rise(optimizer), slope], milestones=[warmup])

    assert ours("constant", 100, warmup) == pytest.approx(torchs(rise, 100), rel=1e-9)
    assert ours("cosine", 100, warmup) == pytest.approx(torchs(rise_and_fall, 100), rel=1e-9)
    assert ours("linear", 100, warmup) == pytest.approx(torchs(rise_and_slope, 100), rel=1e-9)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0.0, 0.3, 1.0, 2.5, 9.99, 10.0])
def test_a_warm_up_of_part_of_a_step(name: str, warmup: float) -> None:
    rates = ours(name, 10, warmup)
    risen = next(step for step in range(10) if step + 1 >= warmup)
    assert rates[risen] == 1.0 and rates[: risen + 1] == sorted(set(rates[: risen + 1]))
    assert all(0 < rate <= 1 for rate in rates) and rates[risen:] == sorted(rates[risen:], reverse=True)


def test_the_schedule_spans_the_run() -> None:
    cfg = make_config({"model": "linear", "epochs": 4, "warmup_epochs": 0.5, "lr": 0.2, "schedule": "cosine"})
    rates = optim.schedule(cfg, steps_per_epoch=10)
    assert rates == [0.2 * optim.factor("cosine", step, 40, 5.0) for step in range(40)]
    assert max(rates) == 0.2 == rates[4] and rates[-1] < 0.001
    scaled = make_config({"model": "linear", "batch_size": 256, "lr_scaling": "linear"})
    assert optim.schedule(scaled, steps_per_epoch=7) == [0.2] * 21
