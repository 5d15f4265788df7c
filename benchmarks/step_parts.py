"""Where a step's time goes, and how much of what this machine's arithmetic and memory allow it reaches.

    python benchmarks/step_parts.py --threads 1

Real steps of one process on the CPU are timed in turn with the barest step that torch's autograd allows, and with
compiled ones (--compile); then the parts within steps, whose clocks cost about a microsecond each. Beside them,
measured in the same sitting: what the step's matrix products and convolutions take when torch's kernels for them are
called alone, again and again; what their operations would take at the rate of the best matrix product or convolution;
and what the bytes that torch's operations read and write would take at the rate of a large copy (what stays in the
cache is faster). Prints a table and writes --out.
"""

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from bench import CASES, HERE, made, spread
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from fashion_ddp import data
from fashion_ddp.config import Config
from fashion_ddp.config.layers import make_config
from fashion_ddp.distributed.world import World, open_world
from fashion_ddp.models import architectures
from fashion_ddp.training import optim
from fashion_ddp.training import step as step_module
from fashion_ddp.training.batches import Batches
from fashion_ddp.training.compiled import compile_pass
from fashion_ddp.training.images import Part
from fashion_ddp.training.step import Step
from fashion_ddp.training.sync import StepRecord

LR = 0.01  # of every step: its value takes no time
PARTS = ["batch", "forward", "backward", "optimizer"]  # the rest is bookkeeping


class Bytes(TorchDispatchMode):
    """Counts the bytes that operations read and write; views do neither."""

    def __init__(self) -> None:
        super().__init__()
        self.moved = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)]
            whole = self.moved_whole(func, tensors)
            self.moved += sum(x.numel() * x.element_size() for x in whole)
        return result

    @staticmethod
    def moved_whole(func: Any, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """index_select reads of its source as much as it writes."""
        return [tensors[-1], tensors[-1]] if "index_select" in str(func) else tensors


class Products(TorchDispatchMode):
    """Keeps the calls of matrix products and convolutions, forward and backward, with what they were given."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Callable[[], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in flop_registry:
            self.calls.append(partial(func, *args, **(kwargs or {})))
        return func(*args, **(kwargs or {}))

    def alone(self) -> float:
        """Seconds that they take, each called again and again with nothing between."""
        with torch.no_grad():
            return sum(statistics.median(_seconds(call) for _ in range(30)) for call in self.calls)


def clocked(spent: dict[str, float], name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = function(*args, **kwargs)
        spent[name] += time.perf_counter() - start
        return result

    return call


def parts(step: Step, steps: range) -> list[dict[str, float]]:
    """Seconds of each part, for each of these steps."""
    spent: dict[str, float] = defaultdict(float)
    forward, losses, backward = step.ddp.forward, F.cross_entropy, step_module.run_backward
    step.ddp.forward = clocked(spent, "forward", forward)
    F.cross_entropy = clocked(spent, "forward", losses)
    step_module.run_backward = clocked(spent, "backward", backward)
    step.batches.piece = clocked(spent, "batch", step.batches.piece)  # type: ignore[method-assign]
    step.optimizer.step = clocked(spent, "optimizer", step.optimizer.step)  # type: ignore[method-assign]
    found = []
    for k in steps:
        spent.clear()
        step(k, LR)
        found.append(dict(spent))
    F.cross_entropy, step_module.run_backward = losses, backward
    return found


def whole_and_barest(step: Step, steps: range) -> list[tuple[float, float]]:
    """Seconds of each of these steps, without clocks in it, and of one that only learns, in turn: the latter's batch
    lies ready, and its update is made by hand."""
    images, labels = (tensor.clone() for tensor in step.batches.piece(0, 0)[:2])
    found = []
    for k in steps:
        begin = time.perf_counter()
        step(k, LR)
        middle = time.perf_counter()
        F.cross_entropy(step.ddp(images), labels).backward()
        with torch.no_grad():
            for parameter in step.trained:
                assert parameter.grad is not None
                parameter.add_(parameter.grad, alpha=-1e-6)
                parameter.grad = None
        found.append((middle - begin, time.perf_counter() - middle))
    return found


def ordinary_and_compiled(step: Step, blocks: int = 9, length: int = 30) -> list[tuple[float, float]]:
    """Seconds of a step, ordinary and with its pass compiled (--compile): means of blocks of steps, in turn."""
    problem = compile_pass(step)
    assert problem is None, problem
    compiled, found = step.take_pass, []
    for _ in range(blocks):
        block = []
        for take_pass in (step.ordinary_pass, compiled):
            step.take_pass = take_pass
            step(0, LR)
            start = time.perf_counter()
            for k in range(1, length + 1):
                step(k, LR)
            block.append((time.perf_counter() - start) / length)
        found.append((block[0], block[1]))
    step.take_pass = step.ordinary_pass
    return found


def rates() -> tuple[float, float]:
    """FLOP/s of matrix products and convolutions, and bytes/s of copies that do not fit the cache: the best of several.

    Both, for they come from different libraries: on AMD, oneDNN's convolutions reach twice the rate of MKL's
    products.
    """
    products = [product_rate(size) for size in (256, 512, 1024, 2048)]
    for rows in (8, 32):  # of a layer with 64 channels in and out, a multiple of every vector's length
        images = torch.rand(rows, 64, 28, 28).to(memory_format=torch.channels_last)
        weight = torch.rand(64, 64, 3, 3).to(memory_format=torch.channels_last)
        seconds = min(_seconds(lambda: F.conv2d(images, weight, padding=1)) for _ in range(10))  # noqa: B023 - as above
        products.append(2 * 9 * 64**2 * rows * 28**2 / seconds)
    return max(products), copy_rate(2**26)


def product_rate(size: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> float:
    """FLOP/s of a product of two square matrices: the best of ten."""
    a, b, c = (torch.rand(size, size, device=device).to(dtype) for _ in range(3))
    return 2 * size**3 / min(_seconds(lambda: torch.mm(a, b, out=c)) for _ in range(10))


def copy_rate(numbers: int, device: str = "cpu") -> float:
    """Bytes/s, read and written, of a copy of so many float32: the best of ten."""
    source, target = (torch.rand(numbers, device=device) for _ in range(2))
    return 8 * numbers / min(_seconds(lambda: target.copy_(source)) for _ in range(10))


def _seconds(function: Callable[[], Any]) -> float:
    """Seconds until a function's work is done, on a card too."""
    wait = torch.cuda.synchronize if torch.cuda.is_initialized() else lambda: None
    wait()
    start = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - start


def config(case: str, **given: Any) -> Config:
    """The settings of a case, as linear-10."""
    model, _, hidden = case.partition("-")
    return make_config({"model": model, "hidden_units": int(hidden)} | given)


def prepare(cfg: Config, world: World, dataset: data.Dataset) -> Step:
    """A run's step, ready for the first epoch."""
    net = architectures.build(cfg, dataset.image_shape, 10, trained_on=world.device.type)
    ddp, batches = world.wrap(net), Batches(cfg, world, Part(dataset.train_images, dataset.train_labels))
    step = Step(cfg, world, ddp, optim.build(cfg, net, world.device), batches, StepRecord(batches))
    step.warm_up()
    step.batches.draw(1)
    return step


def count(step: Step, k: int) -> tuple[int, int, Products]:
    """What one step does: FLOPs of its matrix products and convolutions, bytes that its operations read and write, and
    those products."""
    with FlopCounterMode(display=False) as flops, Bytes() as read, Products() as products:
        step(k, LR)
    return flops.get_total_flops(), read.moved, products


def measure(case: str, recipe: str, threads: int) -> dict[str, Any]:
    cfg = config(case, recipe=recipe, threads=threads, device="cpu")
    d = data.load("fashion_mnist", data.locate("fashion_mnist", None))
    with open_world(cfg) as world:
        step = prepare(cfg, world, d)
        for k in range(10):
            step(k, LR)
        flops, moved, products = count(step, 10)
        steps = range(11, min(step.batches.steps, 311))
        both = whole_and_barest(step, steps)
        pairs = ordinary_and_compiled(step, length=30 if flops < 10**9 else 3)
        rows, alone = parts(step, steps), products.alone()
        arithmetic, memory = rates()
    whole, bare = (statistics.median(seconds) for seconds in zip(*both, strict=True))
    medians = {name: statistics.median(row[name] for row in rows) for name in PARTS}
    medians["bookkeeping"] = max(0.0, whole - sum(medians[name] for name in PARTS))
    limit = flops / arithmetic
    told = {"flops": flops, "bytes": moved, "flops_per_s": arithmetic, "bytes_per_s": memory}
    return {
        "parts_s": medians,
        "step_s": whole,
        "steps": len(rows),
        "barest_s": bare,
        "compiled_s": statistics.median(compiled for _, compiled in pairs),
        "compiled_faster": spread([ordinary / compiled for ordinary, compiled in pairs]),
        "kernels_s": alone,
        "arithmetic_s": limit,
        "share": limit / whole,
        **told,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=CASES)
    parser.add_argument("--recipes", nargs="+", default=["blog", "lab"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "step_parts.json")
    args = parser.parse_args()
    results = {f"{c} {r}": measure(c, r, args.threads) for r in args.recipes for c in args.cases}
    for case, one in results.items():
        told = ", ".join(f"{name} {1e6 * s:.0f}" for name, s in one["parts_s"].items())
        memory = 1e6 * one["bytes"] / one["bytes_per_s"]
        barest, kernels, arithmetic = (1e6 * one[name] for name in ("barest_s", "kernels_s", "arithmetic_s"))
        limit = (
            f"the barest {barest:.0f}, its products and convolutions alone {kernels:.0f}, at full rate "
            f"{arithmetic:.0f} ({one['share']:.0%}), its bytes {memory:.0f}"
        )
        faster = f"compiled {1e6 * one['compiled_s']:.0f}, {one['compiled_faster'][0]:.2f} x"
        print(f"{case}: {1e6 * one['step_s']:.0f} us: {told}; {limit}; {faster}")
    args.out.write_text(json.dumps(made() | {"threads": args.threads, "cases": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
