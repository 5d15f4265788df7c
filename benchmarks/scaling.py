"""What more ranks bring on this machine: 1, 2 and 4 ranks of one thread, the same batch (strong) and a batch of 128 per
rank (weak).

    make bench-scaling
    python benchmarks/scaling.py --cases cnn-25 --ranks 1 2 --repeats 3

Real runs of the blog's recipe, one epoch without W&B, in turn: 1, 2, 4 ranks and again. Throughput is by the run's own
record. The all-reduce's share is the median time of one of the gradient's size, measured in the same ranks when they
have trained, over the median step. After each group of ranks as many separate runs of its share of the batch, side by
side: what they train together is what this machine's cores, caches and memory allow ranks that have nothing to say to
each other. Prints a table and writes --out.
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

from bench import HERE, made, spread


def rank(argv: list[str]) -> None:
    """In a rank: train; then time all-reduces of the gradient's size, and print their median in seconds."""
    import torch

    from fashion_ddp import train  # noqa: TID251 - a clock in a real run
    from fashion_ddp.distributed.world import World, all_reduce
    from fashion_ddp.training.step import Step

    steps: list[Step] = []
    begin, leave = Step.__init__, World.leave

    def keep(step: Step, *args: Any) -> None:
        steps.append(step)
        begin(step, *args)

    def measure(world: World) -> None:
        size = sum(p.numel() for p in steps[0].trained)
        seconds = []
        for _ in range(200):
            gradient = torch.zeros(size)
            world.all_gather_object(None)  # begin together
            start = time.perf_counter()
            all_reduce(gradient)
            seconds.append(time.perf_counter() - start)
        if world.rank == 0:
            print(f"all-reduce {statistics.median(seconds)}", flush=True)
        leave(world)

    Step.__init__, World.leave = keep, measure  # type: ignore[method-assign, assignment]
    sys.exit(train.main(argv))


def run(case: str, ranks: int, batch: int, folder: Path) -> dict[str, float]:
    [told], [summary] = trained(case, ranks, batch, [folder])
    [reduce] = [float(text.split()[1]) for text in told.splitlines() if text.startswith("all-reduce ")]
    step = summary["time/step_p50_ms"] / 1000
    return {"images_per_s": summary["throughput/images_per_s"], "step_s": step, "all_reduce_s": reduce}


def run_apart(case: str, ranks: int, batch: int, folder: Path) -> float:
    """Images a second of so many runs of one rank, all at once, each with its share of the batch."""
    _, summaries = trained(case, 1, batch // ranks, [folder / str(one) for one in range(ranks)])
    return sum(summary["throughput/images_per_s"] for summary in summaries)


def trained(case: str, ranks: int, batch: int, folders: list[Path]) -> tuple[list[str], list[dict[str, Any]]]:
    """What runs print, and their summaries; they train all at once."""
    model, _, hidden = case.partition("-")
    line = [str(Path(sys.executable).parent / "torchrun"), "--standalone", f"--nproc-per-node={ranks}", __file__]
    line += ["--rank", "--model", model, "--hidden-units", hidden, "--batch-size", str(batch), "--epochs", "1"]
    line += ["--device", "cpu", "--threads", "1", "--tracker", "none", "--run-dir"]
    started = [
        subprocess.Popen([*line, str(folder)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for folder in folders
    ]
    said = [process.communicate() for process in started]
    if any(process.returncode for process in started):
        sys.exit(f"a run of {case} on {ranks} ranks failed:\n{''.join(errors for _, errors in said)}")
    return [told for told, _ in said], [json.loads((folder / "summary.json").read_text()) for folder in folders]


def times(ratios: list[float]) -> str:
    return "{:.2f} x ({:.2f} to {:.2f})".format(*ratios)


def main() -> None:
    if sys.argv[1:2] == ["--rank"]:
        rank(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=["linear-10", "cnn-10", "cnn-25"], help="model-hidden_units")
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--kinds", nargs="+", choices=["strong", "weak"], default=["strong", "weak"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "scaling.json")
    args = parser.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for case, kind in [(case, kind) for case in args.cases for kind in args.kinds]:
            rows: dict[int, list[dict[str, float]]] = {ranks: [] for ranks in args.ranks}
            for repeat in range(args.repeats):
                for ranks in args.ranks:
                    batch = 128 * (ranks if kind == "weak" else 1)
                    folder = Path(scratch) / f"{case}-{kind}-{ranks}-{repeat}"
                    rows[ranks].append(run(case, ranks, batch, folder))
                    if ranks > 1:
                        rows[ranks][-1]["apart_images_per_s"] = run_apart(
                            case, ranks, batch, folder.with_suffix(".apart")
                        )
            first = rows[args.ranks[0]]
            for ranks, runs in rows.items():
                ups, apart = (
                    [many[clock] / one["images_per_s"] for many, one in zip(runs, first, strict=True) if clock in many]
                    for clock in ("images_per_s", "apart_images_per_s")
                )
                share = statistics.median(one["all_reduce_s"] / one["step_s"] for one in runs) if ranks > 1 else 0.0
                up, most = spread(ups), spread(apart or ups)
                rate = statistics.median(one["images_per_s"] for one in runs)
                results[f"{case} {kind} {ranks}"] = {
                    "images_per_s": rate,
                    "speed_up": up,
                    "speed_up_apart": most,
                    "efficiency": up[0] / min(ranks, os.cpu_count() or 1),
                    "all_reduce_share": share,
                    "runs": runs,
                }
                print(
                    f"{case}, {kind}, {ranks} ranks: {rate:,.0f} images/s, {times(up)}, n={len(ups)}; "
                    f"as separate runs {times(most)}; all-reduce {share:.0%} of a step",
                    flush=True,
                )
            args.out.write_text(json.dumps(made() | {"cases": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
