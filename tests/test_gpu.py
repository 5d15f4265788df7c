"""What only an NVIDIA card shows: steps as CUDA graphs, NCCL with one rank, half precision, no waiting for the card."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CHECKOUT, command, ranks
from faults import SMALL, Fault, start
from safetensors.torch import load_file
from torch.nn.parallel import DistributedDataParallel
from trainer import Trainer

from fashion_ddp.config.layers import make_config
from fashion_ddp.distributed.world import open_world
from fashion_ddp.models import architectures
from fashion_ddp.training import cuda_graph
from fashion_ddp.training.batches import Batches
from fashion_ddp.training.images import Part

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA card")

# A pattern for each class, and noise: every model learns it in a few steps.
LABELS = np.random.default_rng(1).integers(0, 10, 700)
NOISE = np.random.default_rng(0).integers(0, 128, (710, 1, 28, 28), dtype=np.uint8)
IMAGES = NOISE[:700] + NOISE[700:][LABELS]
# A cnn's kernels are not bit-repeatable unless asked to be, and Adam would blow up their last bits in a dozen steps.
REPEATABLE = "torch.backends.cudnn.deterministic = True"
CNN = {"model": "cnn", "optimizer": "momentum", "lr": 0.1}
CASES: list[dict[str, Any]] = [
    {"model": "linear"},
    {"model": "relu", "optimizer": "momentum", "lr": 0.02, "schedule": "one_cycle"},
    {"model": "mlp", "optimizer": "adam", "lr": 0.001},
    CNN | {"hidden_units": 25},
    CNN | {"micro_batch": 40, "shift": 2, "flip": 0.5, "erase": 0.5, "clip_norm": 1.0},
    CNN | {"batch_norm": True},
    CNN | {"model": "torchvision:resnet18"},
    {"model": "mlp", "optimizer": "adamw", "lr": 0.001, "weight_decay": 0.1, "precision": "bf16"},
    {"model": "cnn", "optimizer": "momentum", "lr": 0.02, "precision": "fp16"},
]
ALONE: list[str] = []
DDP = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"]


def train(
    tmp_path: Path, name: str, launcher: list[str], *flags: str
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The summary and the weights of a dozen steps on the card: in many more, rounding grows to any size."""
    script = tmp_path / "repeatable.py"
    script.write_text(f"import torch\nfrom fashion_ddp.train import main\n{REPEATABLE}\nmain()\n")
    words = ["--dataset", "synthetic", "--epochs", "1", "--batch-size", "1000", "--tracker", "none", "--device", "cuda"]
    words += ["--optimizer", "sgd", "--lr", "0.1", "--run-dir", name]
    done = command(sys.executable, *launcher, str(script), *words, *flags, cwd=tmp_path, PYTHONPATH=str(CHECKOUT))
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / name / "summary.json").read_text())
    return summary, load_file(tmp_path / name / "model.safetensors")


def captured(given: dict[str, Any]) -> tuple[str | None, float, list[float]]:
    """Why a step under DDP is not captured, how far its losses are from those of steps that are not, and its mean loss
    in each of three epochs."""
    cfg = make_config({"batch_size": 128, "epochs": 3} | given)
    torch.backends.cudnn.deterministic = True
    with open_world(cfg) as world:
        losses = []
        for capture in (False, True):
            step = Trainer(
                cfg, world, architectures.build(cfg, (1, 28, 28), 10), Batches(cfg, world, Part(IMAGES, LABELS))
            )
            assert isinstance(step.step.ddp, DistributedDataParallel)
            if capture:
                step.take, no_graph = cuda_graph.capture(step.step, step.state, step.rates)
            went = []
            for epoch in (1, 2, 3):
                step.batches.draw(epoch)
                torch.cuda.synchronize()
                torch.cuda.set_sync_debug_mode("error")  # from here to the read, nothing may wait for the card
                for k in range(step.batches.steps):
                    step(k)
                torch.cuda.set_sync_debug_mode("default")
                went.append([one.loss / one.rows for one in step.read(range(step.batches.steps))])
            losses.append(torch.tensor(went))
        apart = float((losses[0] - losses[1])[0].abs().max())  # in the first epoch: later rounding has grown
        return no_graph, apart, losses[1].mean(1).tolist()


@pytest.mark.parametrize("given", CASES, ids=str)
def test_a_captured_step_does_what_kernels_do_and_the_host_never_waits(given: dict[str, Any]) -> None:
    [(no_graph, apart, means)] = ranks(1, captured, given)
    assert no_graph is None
    assert apart < (1e-4 if "precision" not in given else 2e-2)
    assert means[2] < means[0]


@pytest.mark.parametrize("launcher", [ALONE, DDP], ids=["alone", "ddp"])
@pytest.mark.parametrize("model", ["linear", "relu", "mlp", "cnn"])
def test_a_run_of_graphs_is_a_run_of_kernels(tmp_path: Path, launcher: list[str], model: str) -> None:
    (graphs, weights), (kernels, weights_too) = (
        train(tmp_path, name, launcher, "--model", model, *flags)
        for name, flags in {"graphs": [], "kernels": ["--no-cuda-graph"]}.items()
    )
    assert graphs["cuda_graph"] and not kernels["cuda_graph"]
    for name in weights:
        torch.testing.assert_close(weights[name], weights_too[name], rtol=1e-3, atol=1e-3)


def test_what_is_not_proven_in_a_graph_is_launched_kernel_by_kernel(tmp_path: Path) -> None:
    summary, _ = train(tmp_path, "run", ALONE, "--model", "cnn", "--reduction-shards", "4")
    assert not summary["cuda_graph"]


def gradient(precision: str) -> torch.Tensor:
    cfg = make_config({"model": "cnn", "precision": precision, "batch_size": 128})
    with open_world(cfg) as world:
        step = Trainer(cfg, world, architectures.build(cfg, (1, 28, 28), 10), Batches(cfg, world, Part(IMAGES, LABELS)))
        step.batches.draw(1)
        step.leave_gradient(0)
        return torch.cat([p.grad.flatten() for p in step.step.trained if p.grad is not None]).cpu()


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precisions_gradient_is_near(precision: str) -> None:
    [half], [full] = ranks(1, gradient, precision), ranks(1, gradient, "fp32")
    assert float((half - full).norm() / full.norm()) < 2e-2


def product_errors(precision: str) -> list[float]:
    """How far a matrix product and a convolution of float32 on the card are from those of float64, as shares."""
    with open_world(make_config({"model": "linear", "precision": precision})) as world:
        left, right = (torch.randn(256, 256, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
        images, weight = left.view(16, 16, 16, 16), right[:, :144].reshape(256, 16, 3, 3)
        errors = []
        for multiply, one, other in ((torch.matmul, left, right), (torch.nn.functional.conv2d, images, weight)):
            exact = multiply(one.double(), other.double())
            found = multiply(one.to(world.device), other.to(world.device)).cpu().double()
            errors.append(float((found - exact).norm() / exact.norm()))
        return errors


@pytest.mark.parametrize("precision", ["fp32", "tf32"])
def test_products_are_in_full_but_for_tf32(precision: str) -> None:
    if precision == "tf32" and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("needs a card from Ampere on")
    [errors] = ranks(1, product_errors, precision)
    assert all((error > 1e-5) == (precision == "tf32") for error in errors), errors


def test_a_run_that_was_stopped_continues_its_graphs(tmp_path: Path) -> None:
    # The last of two counts. A linear model, because rounding does not grow in it.
    words = [*SMALL, "--device", "cuda", "--model", "linear", "--optimizer", "sgd", "--lr", "0.1"]
    weights = {}
    for name, faults in {"whole": [], "stopped": [Fault("step", "TERM", count=30)]}.items():
        (folder := tmp_path / name).mkdir()
        ends = [start(1, folder, words, faults).wait()]
        if faults:
            ends.append(start(1, folder, words, []).wait())
        assert ends == ([[75], [0]] if faults else [[0]])
        weights[name] = load_file(folder / "run" / "model.safetensors")
    for layer in weights["whole"]:
        torch.testing.assert_close(weights["stopped"][layer], weights["whole"][layer], rtol=1e-3, atol=1e-3)
