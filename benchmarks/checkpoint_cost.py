"""What checkpoints cost: the share of a run's training time that it spends on them, at the default interval.

    python benchmarks/checkpoint_cost.py --models linear cnn --ranks 1 2 --repeats 3

Each run is a real one, of the blog's recipe on the CPU, with a clock around Checkpoints.keep on rank 0: it holds the
decision, the gathering of the ranks' own states, torch.save, sha256, and the file and its folder forced to the disk.
Runs alternate. Prints medians and the spread; writes --out.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench import made


def timed_run(argv: list[str]) -> None:
    """In a rank: train, and print what the clock says."""
    from fashion_ddp import train  # noqa: TID251 - a clock around a real run
    from fashion_ddp.training.checkpoint import Checkpoints

    together, save = Checkpoints.save, Checkpoints._save
    spent: dict[str, list[float]] = {"together": [], "save": []}

    def clocked(name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> None:
            start = time.perf_counter()
            function(*args, **kwargs)
            spent[name].append(time.perf_counter() - start)

        return call

    Checkpoints.save = clocked("together", together)  # type: ignore[method-assign]
    Checkpoints._save = clocked("save", save)  # type: ignore[method-assign]
    code = train.main(argv)
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps({name: sum(seconds) for name, seconds in spent.items()} | {"saves": len(spent["save"])}))
    sys.exit(code)


def run(model: str, ranks: int, folder: Path) -> dict[str, float]:
    argv = ["--model", model, "--device", "cpu", "--tracker", "none", "--run-dir", str(folder)]
    launcher = [sys.executable]
    if ranks > 1:
        launcher = [str(Path(sys.executable).parent / "torchrun"), "--standalone", f"--nproc-per-node={ranks}"]
    done = subprocess.run([*launcher, __file__, "--rank", *argv], check=True, capture_output=True, text=True)
    spent = json.loads(done.stdout.strip().splitlines()[-1])
    trained = json.loads((folder / "summary.json").read_text())["time/train_total_s"]
    return {"share": spent["together"] / trained, "train_s": trained, **spent}


def main() -> None:
    if sys.argv[1:2] == ["--rank"]:
        timed_run(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["linear", "cnn"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "checkpoint_cost.json")
    args = parser.parse_args()
    cases = [(model, ranks) for model in args.models for ranks in args.ranks]
    runs: dict[str, list[dict[str, float]]] = {f"{model}, {ranks} ranks": [] for model, ranks in cases}
    with tempfile.TemporaryDirectory() as scratch:
        for repeat in range(args.repeats):
            for model, ranks in cases:
                runs[f"{model}, {ranks} ranks"].append(run(model, ranks, Path(scratch) / f"{model}{ranks}-{repeat}"))
    results = {}
    for name, of in runs.items():
        shares = [100 * r["share"] for r in of]
        each = 1000 * statistics.median(r["save"] / r["saves"] for r in of)
        results[name] = {"median_share": statistics.median(shares) / 100, "median_save_ms": each, "runs": of}
        print(
            f"{name}: {statistics.median(shares):.2f} % of {of[0]['train_s']:.1f} s of training "
            f"({min(shares):.2f} to {max(shares):.2f}, n={len(of)}); {of[0]['saves']:.0f} saves of {each:.1f} ms"
        )
    args.out.write_text(json.dumps(made() | {"cases": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
