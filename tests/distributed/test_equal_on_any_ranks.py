"""Promises 1 and 2: the machine's shape is not part of the experiment, and every sample counts once.

Real ranks over gloo, one thread each. Curves are compared in float64, because training a cnn at these rates amplifies
rounding to order one within a hundred steps, in float32 even between one and two threads of one process.
"""

import math
import os
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ranks
from torch import nn
from torchmetrics.functional.classification import multiclass_accuracy
from trainer import Trainer

from fashion_ddp import data
from fashion_ddp.config import Config
from fashion_ddp.config.layers import make_config
from fashion_ddp.distributed.world import open_world
from fashion_ddp.models import architectures
from fashion_ddp.models.dropout import SampleDropout
from fashion_ddp.training import metrics
from fashion_ddp.training.batches import Batches
from fashion_ddp.training.evaluate import Evaluation, Scores, evaluate
from fashion_ddp.training.images import Part

BATCH = 50  # divides by neither 3 nor 4
IMAGES = 30 * BATCH + 2  # the last batch has 2 rows: fewer than 3 or 4 ranks
STEPS = 2 * 31  # two epochs of them


@pytest.fixture(scope="module")
def full(data_dir: Path) -> data.Dataset:
    """All of Fashion-MNIST, read once: reading it takes a rank longer than these tests."""
    return data.load("fashion_mnist", data_dir)


@pytest.fixture(scope="module")
def small(full: data.Dataset) -> data.Dataset:
    """Its first images, and of those every second row and column: [n, 1, 14, 14]."""
    train, test = (np.ascontiguousarray(part[..., ::2, ::2]) for part in (full.train_images[:IMAGES], full.test_images))
    return replace(full, train_images=train, train_labels=full.train_labels[:IMAGES], test_images=test)


def train(cfg: Config, d: data.Dataset, steps: int) -> dict[str, Any]:
    """What one rank sees of some steps: losses, hits, weights, and logits on the test set's first thousand."""
    with open_world(cfg) as world:
        model = architectures.build(cfg, d.image_shape, len(d.classes))
        batches = Batches(cfg, world, Part(d.train_images, d.train_labels))
        evaluation = Evaluation(cfg, world, Part(d.test_images[:1001], d.test_labels[:1001]), len(d.classes))
        step = Trainer(cfg, world, model, batches)
        trained = []
        for epoch in range(1, -(-steps // batches.steps) + 1):
            batches.draw(epoch)
            for window in step.sync.windows(min(batches.steps, steps - step.done)):
                for k in window:
                    step(k)
                trained += step.read(window)
        with step.state.averaged():
            [scores] = evaluation(model)
        return {
            "loss": torch.tensor([t.loss / t.rows for t in trained], dtype=torch.float64),
            "hits": [t.hits for t in trained],
            "rows": [t.rows for t in trained],
            "weights": {k: v.clone() for k, v in model.state_dict().items()},
            "logits": scores.logits,
            "scores": (scores.loss, scores.accuracy),
        }


def settings(**given: Any) -> Config:
    proof = {"precision": "fp64", "device": "cpu", "threads": 1, "batch_size": BATCH, "epochs": 5}
    return make_config(proof | given)


def dropping(shape: tuple[int, int, int], classes: int) -> nn.Module:
    """A user's model that drops values of feature maps and of features."""
    convolution = nn.Conv2d(shape[0], 6, 3), nn.ReLU(), SampleDropout(0.2), nn.MaxPool2d(2), nn.Flatten()
    return nn.Sequential(*convolution, SampleDropout(0.5), nn.Linear(6 * 6 * 6, classes))


DROPPING = {"model": "test_equal_on_any_ranks:dropping"}
CASES = {
    "linear, adam, augmented": {"model": "linear", "optimizer": "adam", "lr": 0.01, "shift": 2, "flip": 0.5},
    "cnn, adam": {"model": "cnn", "hidden_units": 6},
    "cnn, sgd, augmented": {
        "model": "cnn", "hidden_units": 6, "recipe": "lab", "shift": 2, "flip": 0.5, "erase": 0.3,
        "label_smoothing": 0.1, "clip_norm": 0.5, "schedule": "one_cycle", "weight_decay": 1e-3,
    },
    "cnn, batch norm": {"model": "cnn", "hidden_units": 6, "batch_norm": True, "recipe": "lab"},
    "cnn, micro-batches, mixed": {
        "model": "cnn", "hidden_units": 6, "micro_batch": 7, "mixup": 0.4, "cutmix": 1.0, "label_smoothing": 0.1,
    },
    "linear, mixed, other augmentation": {
        "model": "linear", "shuffle": True, "cutout": 5, "alternating_flip": True, "mixup": 0.4,
        "random_resized_crop": 0.3,
    },
    "dropout": DROPPING | {"shuffle": True, "micro_batch": 7},
    # No biases before its batch norm: their gradient is rounding alone, which Adam would bring to full size.
    "small resnet, muon, ema": {
        "model": "small_resnet", "hidden_units": 4, "optimizer": "muon", "lr": 0.02, "ema": 0.9,
    },
    "deep mlp": {
        "model": "deep_mlp", "hidden_units": 12, "depth": 2, "dropout": 0.3, "optimizer": "momentum", "lr": 0.01,
    },
    "mlp, nesterov, linear": {
        "model": "mlp", "optimizer": "momentum", "lr": 0.05, "momentum": 0.8, "nesterov": True, "schedule": "linear",
        "weight_decay": 1e-2, "decay_biases": False,
    },
}  # fmt: skip


# The others prove again, with other layers and optimizers, what these do.
PROOF = ("cnn, adam", "linear, mixed, other augmentation", "dropout", "cnn, batch norm")


@pytest.mark.parametrize("case", [pytest.param(c, marks=[] if c in PROOF else pytest.mark.slow) for c in CASES])
def test_the_number_of_ranks_changes_nothing_in_float64(case: str, small: data.Dataset) -> None:
    cfg = settings(**CASES[case])
    alone = ranks(1, train, cfg, small, STEPS)[0]
    assert len(alone["loss"]) == STEPS and 2 in alone["rows"]
    for world_size in (2, 3, 4):
        for seen in ranks(world_size, train, cfg, small, STEPS):
            torch.testing.assert_close(seen["loss"], alone["loss"], rtol=0, atol=1e-10)
            assert seen["hits"] == alone["hits"] and seen["rows"] == alone["rows"]
            assert torch.equal(seen["logits"].argmax(1), alone["logits"].argmax(1))
            torch.testing.assert_close(seen["scores"], alone["scores"], rtol=0, atol=1e-10)


@pytest.mark.slow
def test_linear_stays_equal_in_float32_for_three_epochs(full: data.Dataset) -> None:
    cfg = settings(model="linear", precision="fp32", batch_size=128, epochs=3)
    alone = ranks(1, train, cfg, full, 3 * 469)[0]
    for world_size in (2, 3, 4):
        seen = ranks(world_size, train, cfg, full, 3 * 469)[0]
        torch.testing.assert_close(seen["loss"], alone["loss"], rtol=0, atol=1e-6)
        assert torch.equal(seen["logits"].argmax(1), alone["logits"].argmax(1))


def gradients(cfg: Config, d: data.Dataset, weights: list[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
    """The gradient of the first batch's mean loss at each of some weights, as one vector."""
    found = []
    with open_world(cfg) as world:
        for state in weights:
            model = architectures.build(cfg, d.image_shape, len(d.classes))
            model.load_state_dict(state)
            step = Trainer(cfg, world, model, Batches(cfg, world, Part(d.train_images, d.train_labels)))
            step.leave_gradient(0)
            found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).clone())
    return found


def test_a_cnn_has_the_same_gradient_in_float32(small: data.Dataset) -> None:
    cfg = settings(model="cnn", precision="fp32")
    start = architectures.build(cfg, small.image_shape, 10).state_dict()
    weights = [start, ranks(1, train, cfg, small, 40)[0]["weights"]]
    alone = ranks(1, gradients, cfg, small, weights)[0]
    for world_size in (2, 3, 4):
        for seen in ranks(world_size, gradients, cfg, small, weights):
            for ours, theirs in zip(seen, alone, strict=True):
                assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


def test_reduction_shards_give_the_same_bits(small: data.Dataset) -> None:
    cfg = settings(precision="fp32", reduction_shards=12, shuffle=True, flip=0.5, cutmix=1.0, **DROPPING)
    alone = ranks(1, train, cfg, small, STEPS)[0]
    for world_size in (2, 3, 4):
        for seen in ranks(world_size, train, cfg, small, STEPS):
            assert all(torch.equal(seen["weights"][name], alone["weights"][name]) for name in alone["weights"])
            assert torch.equal(seen["loss"], alone["loss"])


def plain_loop(
    cfg: Config,
    d: data.Dataset,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: int,
    weight: torch.Tensor | None = None,
) -> list[float]:
    """What a tutorial would write: whole batches in the file's order, mean cross entropy, one process."""
    images, labels = torch.from_numpy(d.train_images).double() / 255, torch.from_numpy(d.train_labels)
    losses: list[float] = []
    while len(losses) < steps:
        for x, y in zip(images.split(cfg.batch_size), labels.split(cfg.batch_size), strict=True):
            loss = F.cross_entropy(model(x), y, weight)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


def tutorial_model(name: str, hidden: int) -> nn.Module:
    """The tutorials' networks, written again from their description."""
    if name == "linear":
        return nn.Sequential(nn.Flatten(), nn.Linear(196, hidden), nn.Linear(hidden, 10))
    if name == "relu":
        return nn.Sequential(nn.Flatten(), nn.Linear(196, hidden), nn.ReLU(), nn.Linear(hidden, 10), nn.ReLU())
    layers: list[nn.Module] = []
    for into in (1, hidden):
        for channels in (into, hidden):
            layers += [nn.Conv2d(channels, hidden, 3, padding=1)]
            layers += [nn.BatchNorm2d(hidden)] if name == "cnn, batch norm" else []
            layers += [nn.ReLU()]
        layers += [nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(hidden * 9, 10))


@pytest.mark.parametrize("name", ["linear", "relu", "cnn", "cnn, batch norm"])
def test_one_process_equals_a_plain_loop(name: str, small: data.Dataset) -> None:
    model = name.split(",")[0]
    # Not Adam for batch norm: the biases before it have a gradient of 0, whose rounding Adam brings to full size.
    extra = {"batch_norm": True, "optimizer": "sgd", "lr": 0.05} if "norm" in name else {}
    cfg = settings(model=model, hidden_units=6, **extra)
    torch.manual_seed(cfg.seed)
    plain = tutorial_model(name, 6).double()
    optimizer = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[cfg.optimizer](plain.parameters(), lr=cfg.lr)
    losses = plain_loop(cfg, small, plain, optimizer, STEPS)
    ours = ranks(1, train, cfg, small, STEPS)[0]
    torch.testing.assert_close(ours["loss"].tolist(), losses, rtol=0, atol=1e-10)
    for mine, theirs in zip(ours["weights"].values(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("given", ["balanced", "1,2,0.5,1,1,4,1,1,3,0.1"])
def test_class_weights_are_torchs_on_any_number_of_ranks(given: str, small: data.Dataset) -> None:
    rare = (small.train_labels > 0) | (np.arange(len(small.train_labels)) % 5 == 0)  # of class 0 a fifth
    d = replace(small, train_images=small.train_images[rare], train_labels=small.train_labels[rare])
    cfg = settings(model="mlp", hidden_units=6, optimizer="sgd", lr=0.1, class_weights=given)
    counts, steps = np.bincount(d.train_labels), 2 * math.ceil(len(d.train_labels) / BATCH)
    weights = len(d.train_labels) / (10 * counts) if given == "balanced" else [float(one) for one in given.split(",")]
    torch.manual_seed(cfg.seed)
    plain = nn.Sequential(nn.Flatten(), nn.Linear(196, 6), nn.ReLU(), nn.Linear(6, 10)).double()
    plain_loop(cfg, d, plain, torch.optim.SGD(plain.parameters(), lr=cfg.lr), steps, torch.as_tensor(weights).double())
    for world_size in (1, 3):
        for seen in ranks(world_size, train, cfg, d, steps):
            for mine, theirs in zip(seen["weights"].values(), plain.state_dict().values(), strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-9)


COUNTS = (3, 1001, 10_000)


def scores_of(cfg: Config, d: data.Dataset) -> list[Scores]:
    with open_world(cfg) as world:
        model = architectures.build(cfg, d.image_shape, len(d.classes))
        parts = {str(n): Part(d.test_images[:n], d.test_labels[:n]) for n in COUNTS}
        sets = {name: Evaluation(cfg, world, part, 10) for name, part in parts.items()}
        figures = metrics.build(None, 10)
        return [*evaluate(cfg, model, sets, figures, last=True).values()]


def test_evaluation_is_exact_on_any_number_of_ranks(small: data.Dataset) -> None:
    cfg = settings(model="mlp", precision="fp32")
    for world_size in (1, 2, 4):
        for seen in ranks(world_size, scores_of, cfg, small):
            for count, scores in zip(COUNTS, seen, strict=True):
                labels, logits = torch.from_numpy(small.test_labels[:count]), scores.logits
                oracle = multiclass_accuracy(logits, labels, num_classes=10, average="micro").item()
                assert scores.accuracy == pytest.approx(oracle, abs=1e-7) and len(logits) == count
                assert scores.loss == pytest.approx(F.cross_entropy(logits.double(), labels).item(), abs=1e-12)
                # By hand: labels among the five likeliest, the mean F1 of the classes, and the gaps of the bins.
                five = (logits.topk(5).indices == labels[:, None]).any(1).double().mean()
                counts = torch.zeros(10, 10).index_put_((labels, scores.predicted), torch.ones(()), accumulate=True)
                either = counts.sum(0) + counts.sum(1)
                f1 = (2 * counts.diagonal() / either)[either > 0].mean()
                sure, right = logits.double().softmax(1).max(1)[0], scores.predicted == labels
                bins = (sure * 15).ceil().long()
                gap = sum(abs(float((sure - right.double())[bins == n].sum())) for n in range(16)) / count
                expected = {"top5": float(five), "macro_f1": float(f1), "calibration_error": gap}
                assert scores.figures == pytest.approx(expected, abs=1e-5)


def policies(chosen: int | None) -> list[int]:
    """How the system schedules a rank's threads: the one that trains, and those that joining the others started."""
    if chosen is not None:
        os.sched_setscheduler(0, chosen, os.sched_param(0))
    before = set(os.listdir("/proc/self/task"))
    with open_world(Config(device="cpu", threads=1)):
        found = {os.sched_getscheduler(0)}
        for thread in set(os.listdir("/proc/self/task")) - before:
            with suppress(ProcessLookupError):  # one that only helped while the ranks joined has ended
                found.add(os.sched_getscheduler(int(thread)))
        return sorted(found)


@pytest.mark.skipif(sys.platform != "linux", reason="Linux's policies")
def test_threads_of_cpu_ranks_do_not_interrupt_each_other_unless_the_user_says_otherwise() -> None:
    assert ranks(2, policies, None) == [[os.SCHED_BATCH]] * 2
    assert ranks(1, policies, None) == [[os.SCHED_OTHER]]
    assert ranks(2, policies, os.SCHED_IDLE) == [[os.SCHED_IDLE]] * 2
