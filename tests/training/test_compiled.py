"""A compiled pass is the ordinary one within rounding, on any number of ranks; what cannot be compiled says why.

That a run with compiled passes continues to the bit: tests/resume/test_resume.py.
"""

import os
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ranks
from torch import nn
from trainer import Trainer

from fashion_ddp.config.layers import make_config
from fashion_ddp.distributed.world import open_world
from fashion_ddp.models import architectures
from fashion_ddp.models.dropout import SampleDropout
from fashion_ddp.training.batches import Batches
from fashion_ddp.training.compiled import compile_pass
from fashion_ddp.training.images import Part

IMAGES = np.random.default_rng(0).integers(0, 256, (70, 1, 28, 28), dtype=np.uint8)
LABELS = np.random.default_rng(1).integers(0, 10, 70)

PLAIN: dict[str, Any] = {"model": "linear", "lr": 0.1}
MIXED = {
    "model": "test_compiled:dropping",
    "optimizer": "adam",
    "lr": 0.001,
    "micro_batch": 3,
    "shift": 2,
    "mixup": 0.5,
    "ema": 0.9,
}
OTHERS: list[dict[str, Any]] = [
    {"model": "cnn", "batch_norm": True, "precision": "fp64", "optimizer": "momentum", "lr": 0.02, "clip_norm": 0.5},
    {"model": "mlp", "precision": "bf16", "lr": 0.1},
]


def dropping(shape: tuple[int, int, int], classes: int) -> nn.Module:
    """A user's model with dropout by image."""
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 32), nn.ReLU(), SampleDropout(0.5), nn.Linear(32, classes))


def losses_and_weights(given: dict[str, Any], compile: bool) -> tuple[list[float], torch.Tensor]:
    """Of two epochs; the last of their batches of 16 has 6 images."""
    cfg = make_config({"device": "cpu", "threads": 1, "batch_size": 16, "epochs": 2} | given)
    with open_world(cfg) as world:
        model = architectures.build(cfg, (1, 28, 28), 10)
        before = [tensor.clone() for tensor in (*model.state_dict().values(), torch.get_rng_state())]
        step = Trainer(cfg, world, model, Batches(cfg, world, Part(IMAGES, LABELS)))
        if compile:
            assert compile_pass(step.step) is None
            assert all(map(torch.equal, before, (*model.state_dict().values(), torch.get_rng_state())))
        losses = []
        for epoch in (1, 2):
            step.batches.draw(epoch)
            for k in range(step.batches.steps):
                step(k)
            losses += [went.loss for went in step.read(range(step.batches.steps))]
        tensors = [*model.state_dict().values(), *(step.step.average.weights if step.step.average else ())]
        return losses, torch.cat([tensor.flatten().double() for tensor in tensors])


def difference(one: tuple[list[float], torch.Tensor], other: tuple[list[float], torch.Tensor]) -> float:
    """The largest one, of losses and of weights."""
    losses = (torch.tensor(one[0]) - torch.tensor(other[0])).abs().max()
    return max(losses.item(), (one[1] - other[1]).abs().max().item())


@pytest.mark.parametrize(
    ("given", "rounding"),
    [
        (PLAIN, 1e-4),
        (MIXED, 1e-3),
        *zip(OTHERS, (1e-9, 0.3), strict=True),
    ],
    ids=str,
)
@pytest.mark.slow
def test_compiled_passes_are_the_ordinary_ones_within_rounding(given: dict[str, Any], rounding: float) -> None:
    [ordinary], [compiled] = (ranks(1, losses_and_weights, given, which) for which in (False, True))
    assert difference(compiled, ordinary) < rounding


def test_two_ranks_with_compiled_passes_are_one_without() -> None:
    given = PLAIN | {"batch_size": 15}
    alone = ranks(1, losses_and_weights, given, False)[0]
    first, second = ranks(2, losses_and_weights, given, True)
    assert torch.equal(first[1], second[1]) and difference(first, alone) < 1e-4


@pytest.mark.slow
def test_compiled_shards_give_the_same_bits_on_two_ranks() -> None:
    given = PLAIN | {"reduction_shards": 4}
    [alone], [first, _] = (ranks(size, losses_and_weights, given, True) for size in (1, 2))
    assert torch.equal(first[1], alone[1])


class Taken(nn.Linear):
    """A user's layer that goes wrong when its operations are recorded."""

    def __init__(self, how: str):
        super().__init__(784, 10)
        self.how, self.calls = how, 0

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        output = super().forward(input.flatten(1))
        if self.how == "asks its weights":
            return output if output.detach().sum() > 1e9 else output + 1
        return output * (self.calls % 3) if self.how == "counts" else nn.functional.dropout(output)


def why_not(how: str) -> tuple[str | None, bool]:
    """Why a model with such a layer is not compiled, and whether ordinary passes go on."""
    cfg = make_config({"device": "cpu", "threads": 1, "batch_size": 16, **PLAIN})
    with open_world(cfg) as world:
        step = Trainer(cfg, world, Taken(how), Batches(cfg, world, Part(IMAGES, LABELS)))
        problem = compile_pass(step.step)
        step(0)
        return problem, step.step.take_pass == step.step.ordinary_pass


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("asks its weights", "torch cannot compile it ("),
        pytest.param("counts", "compiled, it computed something else", marks=pytest.mark.slow),
        pytest.param("drops", "the model draws random numbers, as dropout does", marks=pytest.mark.slow),
    ],
)
def test_what_cannot_be_compiled_says_why_and_trains_all_the_same(how: str, said: str) -> None:
    for problem, ordinary in ranks(1, why_not, how):
        assert problem is not None and problem.startswith(said) and "\n" not in problem and ordinary


def without_compiler() -> tuple[str | None, bool]:
    os.environ["CXX"] = "no-such-compiler"
    return why_not("drops")


def normalized() -> str | None:
    cfg = make_config({"device": "cpu", "threads": 1, "batch_size": 16, "model": "cnn", "batch_norm": True})
    with open_world(cfg) as world:
        model = architectures.build(cfg, (1, 28, 28), 10)
        return compile_pass(Trainer(cfg, world, model, Batches(cfg, world, Part(IMAGES, LABELS))).step)


def test_it_is_not_tried_without_a_compiler_nor_with_batch_norm_over_ranks() -> None:
    said = "there is no no-such-compiler: install it, or name another C++ compiler in CXX"
    assert ranks(1, without_compiler) == [(said, True)]
    assert ranks(2, normalized) == ["batch norm speaks to the other ranks within a pass"] * 2
