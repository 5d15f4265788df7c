"""How fast a recipe reaches an accuracy: the open track, where any recipe is allowed and only the accuracy is given.

    python benchmarks/speedrun.py --model airbench --recipe fast --threshold 0.94 --n 5
    python benchmarks/speedrun.py --model airbench --recipe fast --beside cnn-25-blog      the tutorials' loop in turns

The rules are airbench's (https://github.com/KellerJordan/cifar10-airbench): n runs with seeds 0 to n - 1 that differ in
nothing else, no run is left out, and the mean accuracy, with test-time augmentation where the recipe has it, must be
above the threshold with p < 0.01 (Student's t, one-sided). The clock is the tutorials': training and the passes over
the test set. It leaves out what a process does before its first step: imports, reading the data, joining the other
ranks, two backward passes on the first batch, and on a card the recording of the step. Writes --out after each run;
finished runs are reused.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import bench

from fashion_ddp import data
from fashion_ddp.console import entry_point, say
from fashion_ddp.report.statistics import t_test
from fashion_ddp.runs.reading import load_run

HERE = Path(__file__).parent
CREDIBLE = 0.01  # p below which the threshold is reached


def train(given: argparse.Namespace, others: list[str], seed: int) -> dict[str, Any]:
    """Train one seed, unless it is finished, and return its figures."""
    folder = given.runs_dir / f"{given.model}-{given.recipe}-{seed}"
    flags = ["--model", given.model, "--recipe", given.recipe, "--seed", str(seed), "--run-dir", str(folder), "--reuse"]
    bench.printed([*bench.trainer("ours"), *flags, *others])
    summary = load_run(folder).summary
    plain = summary["test/accuracy"]
    return {
        "seed": seed,
        "accuracy": summary.get("test_tta/accuracy", plain),
        "plain": plain,
        "seconds": summary["time/train_total_s"] + summary["time/eval_total_s"],
        "from_start_to_end_s": summary["time/total_s"],
        **{name: summary[name] for name in ("parameters", "epochs", "precision", "test_evaluations")},
    }


def summarize(runs: list[dict[str, Any]], beside: list[dict[str, Any]], threshold: float) -> str:
    """Say what n runs reached, and how the tutorials' loop did in turns with them."""
    accuracies, seconds = ([run[name] for run in runs] for name in ("accuracy", "seconds"))
    several = len(runs) > 1
    text = f"n = {len(runs)}: {100 * statistics.fmean(accuracies):.3f} %"
    if several:
        p = t_test(accuracies, threshold)
        text += f" +- {100 * statistics.stdev(accuracies):.3f}, p = {p:.2g} that it is not above {100 * threshold:g} %"
        text += " (reached)" if p < CREDIBLE else " (not shown)"
    text += f"; {statistics.median(seconds):.2f} s ({min(seconds):.2f} to {max(seconds):.2f})"
    if beside:
        ratios = [theirs["train_s"] / ours["seconds"] for ours, theirs in zip(runs, beside, strict=False)]
        wrong = statistics.fmean(1 - one["accuracy"] for one in beside) / statistics.fmean(1 - a for a in accuracies)
        text += f"; the tutorials' loop takes {statistics.median(ratios):.2f} times as long"
        text += f" ({min(ratios):.2f} to {max(ratios):.2f}) and makes {wrong:.2f} times as many errors"
    return text


@entry_point
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="airbench")
    parser.add_argument("--recipe", default="fast")
    parser.add_argument("--threshold", type=float, default=0.94)
    parser.add_argument("--n", type=int, default=5)
    parser.add_argument("--beside", help="case of the tutorials' loop to run in turns, as cnn-25-blog")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs/speedrun"))
    parser.add_argument("--out", type=Path, help="results file (default: benchmarks/results/recipe_<recipe>.json)")
    given, others = parser.parse_known_args(argv)
    out = given.out or HERE / "results" / f"recipe_{given.recipe}.json"
    runs: list[dict[str, Any]] = []
    beside: list[dict[str, Any]] = []
    about = {name: getattr(given, name) for name in ("model", "recipe", "threshold", "beside", "device")}
    with tempfile.TemporaryDirectory() as scratch:
        bench.unpack(data.locate("fashion_mnist", None) or data.fetch("fashion_mnist"), Path(scratch))
        for seed in range(given.n):
            runs.append(train(given, [*others, "--device", given.device], seed))
            if given.beside:
                case, _, recipe = given.beside.rpartition("-")
                beside.append(bench.run("plain", given.device, case, recipe, 3, Path(scratch)))
            found = about | {
                "flags": others,
                "made": bench.made(),
                "load": os.getloadavg(),
                "runs": runs,
                "loop": beside,
            }
            out.write_text(json.dumps(found, indent=1) + "\n")
            say(summarize(runs, beside, given.threshold))
    return 0


if __name__ == "__main__":
    sys.exit(main())
