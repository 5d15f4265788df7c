"""Promises 1 and 2: the machine's shape is not part of the experiment, and every sample counts once.

Real ranks over gloo, one thread each. Curves are compared in float64, because training a cnn at these rates amplifies
rounding to order one within a hundred steps, in float32 even between one and two threads of one process.
"""

import os
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import ranks
from torch import nn
from trainer import Trainer

from fashion_ddp import data
from fashion_ddp.config import Config
from fashion_ddp.config.layers import make_config
from fashion_ddp.distributed.world import open_world
from fashion_ddp.models import architectures
from fashion_ddp.training.batches import Batches
from fashion_ddp.training.evaluate import Evaluation

BATCH = 50  # divides by neither 3 nor 4
IMAGES = 30 * BATCH + 2  # the last batch has 2 rows: fewer than 3 or 4 ranks


@cache
def dataset(data_dir: Path, images: int | None) -> data.Dataset:
    full = data.load("fashion_mnist", data_dir)
    return replace(full, train_images=full.train_images[:images], train_labels=full.train_labels[:images])


def train(cfg: Config, steps: int, images: int | None = IMAGES, weights: dict | None = None) -> dict[str, Any]:
    """What one rank sees of some steps: losses, hits, weights, and logits on the test set's first thousand."""
    assert cfg.data_dir is not None
    d = dataset(cfg.data_dir, images)
    with open_world(cfg) as world:
        model = architectures.build(cfg, d.image_shape, len(d.classes))
        if weights:
            model.load_state_dict(weights)
        batches = Batches(cfg, world, d.train_images, d.train_labels)
        evaluation = Evaluation(cfg, world, d.test_images[:1001], d.test_labels[:1001], len(d.classes))
        step = Trainer(cfg, world, model, batches)
        trained = []
        for epoch in range(1, cfg.epochs + 1):
            batches.draw(epoch)
            for window in step.sync.windows(batches.steps):
                window = range(window.start, min(window.stop, window.start + steps - step.done))
                for k in window:
                    step(k)
                trained += step.read(window)
                if step.done == steps:
                    break
            if step.done == steps:
                break
        scores = evaluation(model)
        return {
            "loss": torch.tensor([t.loss / t.rows for t in trained], dtype=torch.float64),
            "hits": [t.hits for t in trained],
            "rows": [t.rows for t in trained],
            "weights": {k: v.clone() for k, v in model.state_dict().items()},
            "logits": scores.logits,
            "scores": (scores.loss, scores.accuracy),
        }


def settings(data_dir: Path, **given: Any) -> Config:
    proof = {"precision": "fp64", "device": "cpu", "threads": 1, "batch_size": BATCH, "epochs": 5}
    return make_config(proof | {"data_dir": data_dir} | given)


CASES = {
    "linear, sgd": {"model": "linear"},
    "linear, adam, augmented": {"model": "linear", "optimizer": "adam", "lr": 0.01, "shift": 2, "flip": 0.5},
    "cnn, adam": {"model": "cnn", "hidden_units": 6},
    "cnn, sgd, augmented": {
        "model": "cnn", "hidden_units": 6, "recipe": "lab", "shift": 2, "flip": 0.5, "erase": 0.3,
        "label_smoothing": 0.1, "clip_norm": 0.5, "schedule": "one_cycle", "weight_decay": 1e-3,
    },
    "cnn, batch norm": {"model": "cnn", "hidden_units": 6, "batch_norm": True, "recipe": "lab"},
    "cnn, micro-batches": {"model": "cnn", "hidden_units": 6, "micro_batch": 7},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_number_of_ranks_changes_nothing_in_float64(case: str, data_dir: Path) -> None:
    cfg = settings(data_dir, **CASES[case])
    alone = ranks(1, train, cfg, 150)[0]
    assert len(alone["loss"]) == 150 and 2 in alone["rows"]
    for world_size in (2, 3, 4):
        for seen in ranks(world_size, train, cfg, 150):
            torch.testing.assert_close(seen["loss"], alone["loss"], rtol=0, atol=1e-10)
            assert seen["hits"] == alone["hits"] and seen["rows"] == alone["rows"]
            assert torch.equal(seen["logits"].argmax(1), alone["logits"].argmax(1))
            torch.testing.assert_close(seen["scores"], alone["scores"], rtol=0, atol=1e-10)


def test_linear_stays_equal_in_float32_for_three_epochs(data_dir: Path) -> None:
    cfg = settings(data_dir, model="linear", precision="fp32", batch_size=128, epochs=3)
    alone = ranks(1, train, cfg, 3 * 469, None)[0]
    for world_size in (2, 3, 4):
        seen = ranks(world_size, train, cfg, 3 * 469, None)[0]
        torch.testing.assert_close(seen["loss"], alone["loss"], rtol=0, atol=1e-6)
        assert torch.equal(seen["logits"].argmax(1), alone["logits"].argmax(1))


def gradient(cfg: Config, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """The gradient of the first batch's mean loss at some weights, as one vector."""
    assert cfg.data_dir is not None
    d = dataset(cfg.data_dir, IMAGES)
    with open_world(cfg) as world:
        model = architectures.build(cfg, d.image_shape, len(d.classes))
        model.load_state_dict(weights)
        step = Trainer(cfg, world, model, Batches(cfg, world, d.train_images, d.train_labels))
        step.leave_gradient(0)
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).clone()


def test_a_cnn_has_the_same_gradient_in_float32(data_dir: Path) -> None:
    cfg = settings(data_dir, model="cnn", precision="fp32")
    start = architectures.build(cfg, (1, 28, 28), 10).state_dict()
    saved = [start] + [ranks(1, train, cfg, steps)[0]["weights"] for steps in (20, 100)]
    for weights in saved:
        alone = ranks(1, gradient, cfg, weights)[0]
        for world_size in (2, 3, 4):
            for seen in ranks(world_size, gradient, cfg, weights):
                assert (seen - alone).norm() <= 1e-5 * alone.norm()


@pytest.mark.parametrize("model", ["linear", "cnn"])
def test_reduction_shards_give_the_same_bits(model: str, data_dir: Path) -> None:
    cfg = settings(data_dir, model=model, precision="fp32", reduction_shards=12, recipe="lab", flip=0.5)
    alone = ranks(1, train, cfg, 60)[0]
    for world_size in (2, 3, 4):
        for seen in ranks(world_size, train, cfg, 60):
            assert all(torch.equal(seen["weights"][name], alone["weights"][name]) for name in alone["weights"])
            assert torch.equal(seen["loss"], alone["loss"])


def plain_loop(cfg: Config, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    """What a tutorial would write: whole batches in the file's order, mean cross entropy, one process."""
    assert cfg.data_dir is not None
    d = dataset(cfg.data_dir, IMAGES)
    images, labels = torch.from_numpy(d.train_images).double() / 255, torch.from_numpy(d.train_labels)
    losses: list[float] = []
    while len(losses) < steps:
        for x, y in zip(images.split(cfg.batch_size), labels.split(cfg.batch_size), strict=True):
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


def tutorial_model(name: str, hidden: int) -> nn.Module:
    """The tutorials' networks, written again from their description."""
    if name == "linear":
        return nn.Sequential(nn.Flatten(), nn.Linear(784, hidden), nn.Linear(hidden, 10))
    if name == "relu":
        return nn.Sequential(nn.Flatten(), nn.Linear(784, hidden), nn.ReLU(), nn.Linear(hidden, 10), nn.ReLU())
    layers: list[nn.Module] = []
    for into in (1, hidden):
        for channels in (into, hidden):
            layers += [nn.Conv2d(channels, hidden, 3, padding=1)]
            layers += [nn.BatchNorm2d(hidden)] if name == "cnn, batch norm" else []
            layers += [nn.ReLU()]
        layers += [nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(hidden * 49, 10))


@pytest.mark.parametrize("name", ["linear", "relu", "cnn", "cnn, batch norm"])
def test_one_process_equals_a_plain_loop(name: str, data_dir: Path) -> None:
    model = name.split(",")[0]
    # Not Adam for batch norm: the biases before it have a gradient of 0, whose rounding Adam brings to full size.
    extra = {"batch_norm": True, "optimizer": "sgd", "lr": 0.05} if "norm" in name else {}
    cfg = settings(data_dir, model=model, hidden_units=6, **extra)
    torch.manual_seed(cfg.seed)
    plain = tutorial_model(name, 6).double()
    optimizer = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[cfg.optimizer](plain.parameters(), lr=cfg.lr)
    steps = 5 * 31  # whole epochs, so that the plain model's weights are those after the last step
    losses = plain_loop(cfg, plain, optimizer, steps)
    ours = ranks(1, train, cfg, steps)[0]
    torch.testing.assert_close(ours["loss"].tolist(), losses, rtol=0, atol=1e-10)
    for mine, theirs in zip(ours["weights"].values(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-9)


def evaluate(cfg: Config, count: int) -> tuple[float, float, torch.Tensor]:
    assert cfg.data_dir is not None
    d = dataset(cfg.data_dir, IMAGES)
    with open_world(cfg) as world:
        model = architectures.build(cfg, d.image_shape, len(d.classes))
        scores = Evaluation(cfg, world, d.test_images[:count], d.test_labels[:count], len(d.classes))(model)
        return scores.loss, scores.accuracy, scores.logits


@pytest.mark.parametrize("count", [3, 1001, 10_000])
def test_evaluation_is_exact_on_any_number_of_ranks(count: int, data_dir: Path) -> None:
    from torchmetrics.functional.classification import multiclass_accuracy

    cfg = settings(data_dir, model="mlp", precision="fp32")
    d = dataset(data_dir, IMAGES)
    labels = torch.from_numpy(d.test_labels[:count])
    for world_size in (1, 2, 4):
        for loss, accuracy, logits in ranks(world_size, evaluate, cfg, count):
            oracle = multiclass_accuracy(logits, labels, num_classes=10, average="micro").item()
            assert accuracy == pytest.approx(oracle, abs=1e-7) and len(logits) == count
            assert loss == pytest.approx(F.cross_entropy(logits.double(), labels).item(), abs=1e-12)


# --- Scheduling -------------------------------------------------------------------------------------------------------


def policies(chosen: int | None) -> list[int]:
    """How the system schedules a rank's threads: the one that trains, and those that joining the others started."""
    if chosen is not None:
        os.sched_setscheduler(0, chosen, os.sched_param(0))
    before = set(os.listdir("/proc/self/task"))
    with open_world(Config(device="cpu", threads=1)):
        new = {os.getpid()} | {int(thread) for thread in set(os.listdir("/proc/self/task")) - before}
        return sorted({os.sched_getscheduler(thread) for thread in new})


@pytest.mark.skipif(sys.platform != "linux", reason="Linux's policies")
def test_threads_of_cpu_ranks_do_not_interrupt_each_other_unless_the_user_says_otherwise() -> None:
    assert ranks(2, policies, None) == [[os.SCHED_BATCH]] * 2
    assert ranks(1, policies, None) == [[os.SCHED_OTHER]]
    assert ranks(2, policies, os.SCHED_IDLE) == [[os.SCHED_IDLE]] * 2
