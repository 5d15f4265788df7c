"""Muon beside torch's own, and beside its formula written out; AdamW for the rest beside torch's."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fashion_ddp.config.layers import make_config
from fashion_ddp.training import optim
from fashion_ddp.training.muon import Muon, orthogonalized
from fashion_ddp.training.state import fits

pytestmark = pytest.mark.quick

CPU = torch.device("cpu")
STEPS = 5


class Net(nn.Module):
    """Kernels and matrices, tall and wide, biases, a norm, and a layer that no gradient reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.norm = nn.Conv2d(1, 6, 3), nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6)
        self.tall, self.wide, self.idle = nn.Linear(4, 9), nn.Linear(9, 4), nn.Linear(9, 4)
        self.last = nn.Linear(4, 10)


def trained(net: nn.Module, optimizer: torch.optim.Optimizer, rate: Callable[[int], Any] = lambda k: 0.02) -> None:
    """Some updates, each with gradients of its own: of full size, as an orthogonal update's are."""
    draws = torch.Generator().manual_seed(1)
    for k in range(STEPS):
        for name, p in net.named_parameters():
            gradient = torch.randn(p.shape, generator=draws, dtype=torch.float64).to(p.dtype)
            p.grad = gradient if p.requires_grad and "idle" not in name else None
        for group in optimizer.param_groups:
            group["lr"] = rate(k)
        optimizer.step()


def net_and_optimizer(**given: Any) -> tuple[Net, Muon]:
    torch.manual_seed(0)
    net = Net().double()
    optimizer = optim.build(make_config({"optimizer": "muon", "lr": 0.02} | given), net, CPU)
    assert isinstance(optimizer, Muon)
    return net, optimizer


def plain(net: nn.Module, rate: Callable[[int], float], momentum: float, decay: float) -> None:
    """The post's algorithm, one matrix at a time, for all but the last one."""
    matrices = [p for name, p in net.named_parameters() if p.dim() > 1 and "idle" not in name][:-1]
    others = [p for name, p in net.named_parameters() if "idle" not in name and not any(p is m for m in matrices)]
    adam = torch.optim.AdamW(others, weight_decay=decay, fused=True)
    buffers = [torch.zeros_like(p) for p in matrices]

    def step() -> None:
        for p, buffer in zip(matrices, buffers, strict=True):
            assert p.grad is not None
            buffer.mul_(momentum).add_(p.grad, alpha=1 - momentum)
            x = ((1 - momentum) * p.grad + momentum * buffer).reshape(len(p), -1)
            x = x / x.norm()
            for _ in range(5):
                x = 3.4445 * x - 4.7750 * x @ x.T @ x + 2.0315 * x @ x.T @ x @ x.T @ x
            p.data *= 1 - adam.param_groups[0]["lr"] * 5 * decay
            p.data -= adam.param_groups[0]["lr"] * 5 * math.sqrt(max(1, len(p) / x.shape[1])) * x.view(p.shape)

    adam.register_step_pre_hook(lambda *_: step())
    trained(net, adam, lambda k: rate(k) / 5)


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("given", [{}, {"momentum": 0.8, "weight_decay": 0.1}], ids=str)
def test_an_update_is_the_formulas(given: dict[str, Any], as_tensor: bool, memory: torch.memory_format) -> None:
    def rate(k: int) -> float:
        return 0.1 / (k + 1)

    def given_rate(k: int) -> Any:
        return torch.tensor(rate(k), dtype=torch.float64) if as_tensor else rate(k)

    net, optimizer = net_and_optimizer(adam_lr=0.02 / 5, **given)
    trained(net.to(memory_format=memory), optimizer, given_rate)
    other = net_and_optimizer()[0]
    plain(other, rate, given.get("momentum", 0.95), given.get("weight_decay", 0.0))
    for (name, ours), theirs in zip(net.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12, msg=name)


def test_it_is_torchs_up_to_bfloat16() -> None:
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(30, 20, bias=False), nn.Linear(20, 20, bias=False), nn.Linear(20, 50, bias=False))
    theirs = nn.Sequential(*(nn.Linear(m.in_features, m.out_features, bias=False) for m in ours.children()))
    theirs.load_state_dict(ours.state_dict())
    before = [p.detach().clone() for p in ours.parameters()]
    groups = [{"params": [*ours.parameters()], "method": "muon"}]
    trained(ours, Muon(groups, lr=0.02, momentum=0.9, weight_decay=0.1))
    trained(theirs, torch.optim.Muon(theirs.parameters(), lr=0.02, momentum=0.9, weight_decay=0.1))
    for old, one, two in zip(before, ours.parameters(), theirs.parameters(), strict=True):
        assert (one - two).norm() < 0.02 * (one - old).norm()


def test_singular_values_are_brought_near_one() -> None:
    torch.manual_seed(0)
    values = torch.linalg.svdvals(
        orthogonalized(torch.randn(3, 20, 50) * torch.tensor([1e-6, 1.0, 1e6])[:, None, None])
    )
    assert values.min() > 0.6 and values.max() < 1.3
    assert not orthogonalized(torch.zeros(1, 3, 2)).any()


def names(net: nn.Module, optimizer: torch.optim.Optimizer) -> list[list[str]]:
    of = {id(p): name for name, p in net.named_parameters()}
    return [[of[id(p)] for p in group["params"]] for group in optimizer.param_groups]


def test_it_trains_all_matrices_but_the_last_and_keeps_what_is_told() -> None:
    net = Net()
    net.conv1.requires_grad_(False)
    cfg = make_config({"optimizer": "muon", "lr": 0.02, "adam_lr": 0.001, "batch_size": 512, "lr_scaling": "sqrt"})
    optimizer = optim.build(cfg, net, CPU)
    biases = ["conv2.bias", "norm.weight", "norm.bias", "tall.bias", "wide.bias", "idle.bias"]
    muons = ["conv2.weight", "tall.weight", "wide.weight", "idle.weight"]
    assert names(net, optimizer) == [muons, [*biases, "last.weight", "last.bias"]]
    muon, adam = optimizer.param_groups
    assert (muon["lr"], muon["momentum"]) == (0.04, 0.95) and adam["lr"] * adam["lr_ratio"] == pytest.approx(0.002)
    idle = net.idle.weight.detach().clone()
    trained(net, optimizer)
    like = {n: one for n, one in optim.state_like(cfg, optimizer).items() if n not in (3, 9)}  # of the idle layer
    assert fits(optimizer.state_dict()["state"], like)
    assert torch.equal(net.idle.weight, idle)


def test_a_head_that_is_frozen_leaves_the_other_matrices_to_it() -> None:
    net = Net()
    for part in (net.last, net.norm, net.tall, net.wide, net.idle):
        part.requires_grad_(False)
    optimizer = optim.build(make_config({"optimizer": "muon", "lr": 0.02}), net, CPU)
    assert names(net, optimizer) == [["conv1.weight", "conv2.weight"], ["conv1.bias", "conv2.bias"]]
    only = nn.Linear(2, 3)
    assert names(only, optim.build(make_config({"optimizer": "muon", "lr": 0.02}), only, CPU)) == [["weight", "bias"]]


def free_of_decay(net: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    groups = zip(names(net, optimizer), optimizer.param_groups, strict=True)
    return [name for group, settings in groups if settings["weight_decay"] == 0 for name in group]


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam", "adamw", "muon"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_biases_and_norms_are_left_without_decay_where_asked(optimizer: str, device: str) -> None:
    given, net = {"optimizer": optimizer, "lr": 0.02, "weight_decay": 0.1}, Net()
    built = [
        optim.build(make_config(given | {"decay_biases": flag}), net, torch.device(device)) for flag in (True, False)
    ]
    assert len(names(net, built[0])) == (2 if optimizer == "muon" else 1) and not free_of_decay(net, built[0])
    assert free_of_decay(net, built[1]) == [name for name, p in net.named_parameters() if p.dim() < 2]
    every = [parameter for group in built[1].param_groups for parameter in group["params"]]
    assert len(every) == len({*every}) == len([*net.parameters()])
    if optimizer == "momentum" and device == "cuda":
        assert {*built[1].state} == {*every}  # for fp16, which may skip the first update


def test_without_gradients_decay_alone_moves_weights() -> None:
    net, optimizer = net_and_optimizer(decay_biases=False, weight_decay=1.0)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    shrunk = {name for name, p in net.named_parameters() if not torch.equal(p, before[name])}
    assert shrunk == {name for name, p in net.named_parameters() if p.dim() > 1}
