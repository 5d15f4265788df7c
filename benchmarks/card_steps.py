"""The steps of benchmarks/card.py. Each finds out one thing on one NVIDIA card.

    python benchmarks/card_steps.py STEP OPTIONS            the options as JSON, as card.py gives them

What a step finds goes to standard output as soon as it is there: a line of JSON each, [section, name, what was found].
Everything else that is printed goes to standard error.
"""

import argparse
import importlib.util
import json
import os
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from bench import compare, printed, run, trainer
from step_parts import config, copy_rate, count, prepare, product_rate
from torch import Tensor, nn

from fashion_ddp import data
from fashion_ddp.config.names import architectures
from fashion_ddp.distributed import machine
from fashion_ddp.distributed.world import World, open_world
from fashion_ddp.errors import CommandFailed, UserError
from fashion_ddp.models.architectures import build
from fashion_ddp.training.batches import to_unit

GRAPH, KERNELS, DDP = "ours", "ours, kernel by kernel", "ours, DDP of one rank"
WAYS = ["plain", "accelerate", GRAPH, KERNELS, DDP]
OUT = sys.stdout  # where the findings go
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
AT_ONCE = min(4, machine.usable_cores())  # of what is not timed


def tell(section: str, name: str, found: Any) -> None:
    print(json.dumps([section, name, found]), file=OUT, flush=True)


def attempt(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What work returns; where a program that it runs fails, the last lines of that."""
    try:
        return work()
    except CommandFailed as error:
        return {"failed": str(error).splitlines()}


# --- The steps --------------------------------------------------------------------------------------------------


def describe(options: argparse.Namespace) -> None:
    """What is there."""
    properties = torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info(0)
    driver = machine.run_and_read_lines("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    found = {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": total,
        "free_bytes": free,
        "driver": next(iter(driver), None),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
    }
    for name, value in found.items():
        tell("card", name, value)


def smoke(options: argparse.Namespace) -> None:
    """A dozen steps of each model: alone, and under DDP with NCCL."""

    def start(way: str, model: str) -> dict[str, Any]:
        folder = Path(tempfile.mkdtemp(dir=options.scratch)) / "run"
        line = [*trainer(way), "--model", model, "--device", "cuda", "--dataset", "synthetic", "--epochs", "1"]
        said = printed([*line, "--batch-size", "1000", "--run-dir", str(folder)]).splitlines()
        summary = json.loads((folder / "summary.json").read_text())
        environment = json.loads((folder / "environment.json").read_text())[-1]
        return {
            "said": [line for line in said if not line.startswith(("  ", "run ", "ranks ", "finished"))],
            "cuda_graph": summary["cuda_graph"],
            "loss": summary["test/loss"],
            "backend": environment["backend"],
        }

    models = options.models or list(architectures())
    with ThreadPoolExecutor(AT_ONCE) as pool:
        runs = {
            pool.submit(attempt, lambda way=way, model=model: start(way, model)): (way, model)  # type: ignore[misc]
            for way in (GRAPH, DDP)
            for model in models
        }
        for done in as_completed(runs):
            way, model = runs[done]
            tell("smoke", f"{model}, {way}", done.result())


def tests(options: argparse.Namespace) -> None:
    """The tests that need a card."""
    try:
        import pytest
    except ModuleNotFoundError:
        sys.exit("pytest is not installed here: make setup DEV=1")

    class Each:
        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.when == "call" or not report.passed:
                found = {"outcome": report.outcome, "seconds": report.duration}
                tell("tests", report.nodeid, found | {"why": report.longreprtext.splitlines()[-40:]})

    at_once = ["-n", str(AT_ONCE)] if importlib.util.find_spec("xdist") else []
    code = pytest.main([options.tests, "-p", "no:cacheprovider", *at_once], plugins=[Each()])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):  # what failed was told
        sys.exit(f"pytest ended with {code!r}")


def track(options: argparse.Namespace) -> None:
    """A first round of the closed track."""
    take_round(options, {})


def rounds(options: argparse.Namespace) -> None:
    """More rounds of the closed track: until the time is over."""
    found = json.loads(Path(options.out).read_text()).get("track", {})
    for _ in range(options.repeats - 1):
        take_round(options, found)


def take_round(options: argparse.Namespace, found: dict[str, Any]) -> None:
    """Train each case in every way, in turn, and add that to what earlier rounds found."""

    def known(case: str) -> dict[str, list[dict[str, Any]]]:
        """The runs of earlier rounds, by way; a way that failed is not among them."""
        ways = found.get(f"{case} blog")
        return {way: one["runs"] for way, one in ways.items()} if ways else {way: [] for way in WAYS}

    for case in sorted(options.cases, key=lambda case: len(known(case)["plain"])):  # one that a round left out first
        name, rows = f"{case} blog", known(case)
        for way in list(rows):
            one = attempt(lambda: run(way, "cuda", case, "blog", options.epochs, options.scratch))  # noqa: B023
            rows[way].append(one)
            if "failed" in one:
                del rows[way]
                tell("track failed", f"{name}, {way}", one["failed"])
        if "plain" in rows:  # what the others are compared with
            found[name] = compare(rows)
            tell("track", name, found[name])


def precision(options: argparse.Namespace) -> None:
    """Each precision: how fast the card is in it, how far it is from float64, and a run."""
    case = options.cases[0]
    for name in options.precisions:
        line = [sys.executable, __file__, "exactness", json.dumps({"precision": name, "cases": options.cases})]

        def find() -> dict[str, Any]:
            told = (json.loads(text) for text in printed(line).splitlines())  # noqa: B023 - called at once
            return {what: found for _, what, found in told}

        found = attempt(find)
        tell("precision", name, found)
        if "failed" not in found:
            flags = ["--precision", name]
            trained = attempt(lambda: run(GRAPH, "cuda", case, "blog", 1, options.scratch, flags))  # noqa: B023
            tell("precision", name, found | {case: trained})


def exactness(options: argparse.Namespace) -> None:
    """One precision, in a process of its own, because it is chosen once: the rates of the card, and by case, at the
    first batch and the initial weights, how far logits and gradient are from those of float64 on the CPU."""
    dataset = data.load("fashion_mnist")
    cfgs = [config(case, device="cuda", precision=options.precision) for case in options.cases]
    with open_world(cfgs[0]) as world:
        dtype = DTYPES[options.precision]
        best = max(product_rate(size, "cuda", dtype) for size in (4096, 8192))
        tell("", "rates", {"flops_per_s": best, "bytes_per_s": copy_rate(2**28, "cuda")})
        distances, counts = {}, {}
        for case, cfg in zip(options.cases, cfgs, strict=True):
            step = prepare(cfg, world, dataset)
            flops, moved, _ = count(step, 0)
            counts[case] = {"flops": flops, "bytes": moved}
            exact = build(cfg, dataset.image_shape, 10).double()
            model = build(cfg, dataset.image_shape, 10, trained_on=world.device.type)
            images = torch.from_numpy(dataset.train_images[: cfg.batch_size])
            labels = torch.from_numpy(dataset.train_labels[: cfg.batch_size])
            truth = answers(exact, images, labels)
            found = answers(world.wrap(model), images, labels, world)
            apart = [float((one - true).norm() / true.norm()) for one, true in zip(found, truth, strict=True)]
            distances[case] = dict(zip(("logits", "gradient"), apart, strict=True))
    tell("", "distances", distances)
    tell("", "counts", counts)


def answers(model: nn.Module, images: Tensor, labels: Tensor, world: World | None = None) -> tuple[Tensor, Tensor]:
    """The logits [n, 10] and the gradient of the mean loss, in one vector, as float64 on the CPU."""
    device, scaler = (world.device, world.accelerator.scaler) if world else (torch.device("cpu"), None)
    dtype = torch.float32 if world else torch.float64
    logits = model(to_unit(images.to(device), dtype))
    loss = F.cross_entropy(logits, labels.to(device))
    (loss if scaler is None else scaler.scale(loss)).backward()
    scale = 1.0 if scaler is None else scaler.get_scale()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return logits.detach().double().cpu(), gradient.double().cpu() / scale


def memory(options: argparse.Namespace) -> None:
    """What a run takes of the card: by torch's own count, and by how much less is free while it trains."""
    case = options.cases[0]
    for way in (GRAPH, KERNELS, DDP):
        free, _ = torch.cuda.mem_get_info(0)
        least, ended = [free], threading.Event()

        def watch() -> None:
            while not ended.wait(0.02):  # noqa: B023 - this way's
                least[0] = min(least[0], torch.cuda.mem_get_info(0)[0])  # noqa: B023

        watching = threading.Thread(target=watch)
        watching.start()
        found = attempt(lambda: run(way, "cuda", case, "blog", 1, options.scratch))  # noqa: B023
        ended.set()
        watching.join()
        taken = {} if "failed" in found else {"torch_bytes": found["peak_bytes"], "taken_bytes": free - least[0]}
        tell("memory", f"{case}, {way}", taken or found)


STEPS = [describe, smoke, tests, track, precision, memory, rounds]

if __name__ == "__main__":
    OUT = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed
    word, given = sys.argv[1:]
    [function] = [one for one in (*STEPS, exactness) if one.__name__ == word]
    try:
        function(argparse.Namespace(**json.loads(given)))
    except UserError as error:  # a precision that this card or code has not
        sys.exit(f"error: {error}")
    OUT.close()
    sys.stderr.flush()
    # All was told. Autograd's threads have run Python, to count; at the interpreter's end one may abort the process.
    os._exit(0)
