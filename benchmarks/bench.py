"""How much faster a run trains than the tutorials' loop, and than Accelerate's ordinary way, on this machine.

    make bench                                              everything: hours
    python benchmarks/bench.py --cases linear-10 --recipes blog --repeats 3

The same model, batch, optimizer and epochs (the closed track: only what the system does counts), in turn in one
sitting: plain, accelerate, ours on one process, on a rank per core, with compiled passes, and again. Two clocks:
T_train is the tutorials', the epochs with a test pass each; T_cold is a whole process, from the shell to its exit.
Prints medians and the spread of the ratios to `plain`, and writes --out. How the contenders' loops look:
benchmarks/tutorial.py. On a card benchmarks/card.py measures the same.
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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fashion_ddp import data
from fashion_ddp.distributed import machine
from fashion_ddp.errors import CommandFailed
from fashion_ddp.runs import provenance

HERE = Path(__file__).parent
CASES = ["linear-10", "relu-10", "cnn-10", "cnn-25"]
WAYS = ["plain", "accelerate", "ours", "ours, a rank per core", "ours, compiled"]
RANKS = {"ours, a rank per core": machine.usable_cores(), "ours, DDP of one rank": 1}  # of torchrun
FLAGS = {"ours, kernel by kernel": ["--no-cuda-graph"], "ours, compiled": ["--compile"]}


def made() -> dict[str, Any]:
    """What a results file says of its origin."""
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    about = {"processor": machine.cpu_name(), "cores": os.cpu_count(), "card": card, **provenance.versions()}
    return {"date": time.strftime("%Y-%m-%d"), "commit": provenance.git_commit(), "machine": about}


def printed(line: list[str]) -> str:
    """Run a program, and return what it prints. Raises CommandFailed with the last lines of its errors."""
    done = subprocess.run(line, check=False, capture_output=True, text=True)
    if done.returncode:
        raise CommandFailed("\n".join(done.stderr.splitlines()[-40:]) or f"exit code {done.returncode}")
    return done.stdout


def trainer(way: str) -> list[str]:
    """The beginning of the line that trains in one of our ways, to which flags of fashion_ddp.train are added."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS.get(way, 0)}"]
    started = [sys.executable, *(torchrun if way in RANKS else []), "-m", "fashion_ddp.train"]
    return [*started, "--tracker", "none", *FLAGS.get(way, [])]


def run(
    way: str, device: str, case: str, recipe: str, epochs: int, scratch: Path, flags: Sequence[str] = ()
) -> dict[str, Any]:
    """T_train, T_cold and the accuracy of one process, or one group of ranks; of ours, which take `flags`, also the
    median step in seconds and the peak memory in bytes. Raises CommandFailed."""
    model, _, hidden = case.partition("-")
    start = time.perf_counter()
    if way in ("plain", "accelerate"):
        words = [way, device, model, recipe, hidden, str(epochs), str(scratch)]
        line = [sys.executable, str(HERE / "tutorial.py"), *words]
        return json.loads(printed(line)) | {"cold_s": time.perf_counter() - start}
    folder = Path(tempfile.mkdtemp(dir=scratch)) / "run"
    line = [*trainer(way), "--model", model, "--recipe", recipe, "--hidden-units", hidden, "--epochs", str(epochs)]
    printed([*line, "--device", device, "--run-dir", str(folder), *flags])
    cold = time.perf_counter() - start
    summary = json.loads((folder / "summary.json").read_text())
    return {
        "train_s": summary["time/train_total_s"] + summary["time/eval_total_s"],
        "accuracy": summary["test/accuracy"],
        "cold_s": cold,
        "step_s": summary["time/step_p50_ms"] / 1000,
        "peak_bytes": summary["peak_memory_bytes"],
    }


def compare(rows: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
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
    for file in data.PUBLISHED["fashion_mnist"].files:
        content = (path := file.path_in(source)).read_bytes()
        (raw / file.name).write_bytes(gzip.decompress(content) if path.suffix == ".gz" else content)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=CASES, help="model-hidden_units")
    parser.add_argument("--recipes", nargs="+", default=["blog", "lab"])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "bench.json")
    args = parser.parse_args()
    source = data.locate("fashion_mnist", None) or data.fetch("fashion_mnist")
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        unpack(source, Path(scratch))
        for case, recipe in [(case, recipe) for recipe in args.recipes for case in args.cases]:
            rows: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
            for _ in range(args.repeats):
                for way in WAYS:
                    rows[way].append(run(way, "cpu", case, recipe, args.epochs, Path(scratch)))
            results[f"{case} {recipe}"] = compare(rows)
            for way, one in results[f"{case} {recipe}"].items():
                median, low, high = one["train_s_ratio"]
                print(
                    f"{case} {recipe}, {way}: T_train {one['train_s']:.2f} s, {median:.2f} x ({low:.2f} to {high:.2f}, "
                    f"n={args.repeats}); T_cold {one['cold_s']:.2f} s, {one['cold_s_ratio'][0]:.2f} x",
                    flush=True,
                )
            args.out.write_text(json.dumps(made() | {"epochs": args.epochs, "cases": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
