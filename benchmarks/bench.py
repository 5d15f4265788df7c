"""How much faster a run trains than the tutorials' loop, and than Accelerate's ordinary way, on this machine.

    make bench                                              everything: hours
    python benchmarks/bench.py --cases linear-10 --recipes blog --repeats 3
    python benchmarks/bench.py --device cuda                on one card

The same model, batch, optimizer and epochs (the closed track: only what the system does counts), in turn in one
sitting: plain, accelerate, ours on one process, ours on a rank per core (on a card: ours kernel by kernel, ours as one
CUDA graph, that in half precision, and under DDP), and again. Two clocks: T_train is the tutorials', the epochs with a
test pass each; T_cold is a whole process, from the shell to its exit. Prints medians and the spread of the ratios to
`plain`, and writes --out. How the contenders' loops look: benchmarks/tutorial.py.
"""

import argparse
import gzip
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from fashion_ddp import data
from fashion_ddp.distributed import machine
from fashion_ddp.runs import provenance

HERE = Path(__file__).parent
CASES = ["linear-10", "relu-10", "cnn-10", "cnn-25"]
WAYS = {
    "cpu": ["plain", "accelerate", "ours", "ours, a rank per core"],
    "cuda": ["plain", "accelerate", "ours, kernel by kernel", "ours", "ours, bf16", "ours, DDP of one rank"],
}
RANKS = {"ours, a rank per core": machine.usable_cores(), "ours, DDP of one rank": 1}  # of torchrun
FLAGS = {"ours, kernel by kernel": ["--no-cuda-graph"], "ours, bf16": ["--precision", "bf16"]}


def made() -> dict[str, Any]:
    """What a results file says of its origin."""
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    about = {"processor": machine.cpu_name(), "cores": os.cpu_count(), "card": card, **provenance.versions()}
    return {"date": time.strftime("%Y-%m-%d"), "commit": provenance.git_commit(), "machine": about}


def run(way: str, device: str, case: str, recipe: str, epochs: int, scratch: Path) -> dict[str, float]:
    """T_train, T_cold and the accuracy of one process, or one group of ranks."""
    model, _, hidden = case.partition("-")
    start = time.perf_counter()
    if way in ("plain", "accelerate"):
        words = [way, device, model, recipe, hidden, str(epochs), str(scratch)]
        line = [sys.executable, str(HERE / "tutorial.py"), *words]
        told = json.loads(subprocess.run(line, check=True, capture_output=True).stdout)
        return told | {"cold_s": time.perf_counter() - start}
    folder = Path(tempfile.mkdtemp(dir=scratch)) / "run"
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS.get(way, 0)}"]
    line = [sys.executable, *(torchrun if way in RANKS else [])]
    line += ["-m", "fashion_ddp.train", "--model", model, "--recipe", recipe, "--hidden-units", hidden]
    line += ["--epochs", str(epochs), "--device", device, "--tracker", "none", "--run-dir", str(folder)]
    line += FLAGS.get(way, [])
    subprocess.run(line, check=True, capture_output=True)
    cold = time.perf_counter() - start
    summary = json.loads((folder / "summary.json").read_text())
    train = summary["time/train_total_s"] + summary["time/eval_total_s"]
    return {"train_s": train, "accuracy": summary["test/accuracy"], "cold_s": cold}


def compare(rows: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Medians, and the ratios to the plain loop's run of the same round."""
    found: dict[str, Any] = {}
    for way, runs in rows.items():
        found[way] = {"runs": runs}
        for clock in ("train_s", "cold_s"):
            ratios = [p[clock] / o[clock] for p, o in zip(rows["plain"], runs, strict=True)]
            found[way][clock] = statistics.median(one[clock] for one in runs)
            found[way][f"{clock}_ratio"] = spread(ratios)
    return found


def spread(values: list[float]) -> list[float]:
    """Median, smallest and largest."""
    return [statistics.median(values), min(values), max(values)]


def unpack(source: Path, root: Path) -> None:
    """torchvision wants the files unpacked."""
    raw = root / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for path in source.rglob("*-ubyte.gz"):
        (raw / path.stem).write_bytes(gzip.decompress(path.read_bytes()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=CASES, help="model-hidden_units")
    parser.add_argument("--recipes", nargs="+", default=["blog", "lab"])
    parser.add_argument("--device", choices=WAYS, default="cpu")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="by default benchmarks/results/bench.json, or bench_cuda.json")
    args = parser.parse_args()
    out = args.out or HERE / "results" / ("bench.json" if args.device == "cpu" else "bench_cuda.json")
    source = data.locate("fashion_mnist", None) or data.fetch("fashion_mnist")
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        unpack(source, Path(scratch))
        for case, recipe in [(case, recipe) for recipe in args.recipes for case in args.cases]:
            rows: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS[args.device]}
            for _ in range(args.repeats):
                for way in WAYS[args.device]:
                    rows[way].append(run(way, args.device, case, recipe, args.epochs, Path(scratch)))
            results[f"{case} {recipe}"] = compare(rows)
            for way, one in results[f"{case} {recipe}"].items():
                median, low, high = one["train_s_ratio"]
                print(
                    f"{case} {recipe}, {way}: T_train {one['train_s']:.2f} s, {median:.2f} x ({low:.2f} to {high:.2f}, "
                    f"n={args.repeats}); T_cold {one['cold_s']:.2f} s, {one['cold_s_ratio'][0]:.2f} x",
                    flush=True,
                )
            out.write_text(json.dumps(made() | {"epochs": args.epochs, "cases": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
