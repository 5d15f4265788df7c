"""How long a comparison takes from the shell to the report, on the CPU of this machine.

    python benchmarks/comparisons.py --cases short --repeats 3

In turn in one sitting: each rank started by itself, one per core, as before there was a server; from one server; from
it, each run in one process, which is what `make compare` does; and so, as many at once as there are cores. Prints the
seconds and their ratios to the first way, and writes --out.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Self

from bench import HERE, made, spread

from fashion_ddp.distributed import machine
from launch import local  # noqa: TID251
from launch.fork_server import start_process  # noqa: TID251

CASES = {
    "short": (
        "nine short runs: linear, relu and mlp on 3 seeds",
        ["--models", "linear", "relu", "mlp"],
        ["0", "1", "2"],
    ),
    "four": ("the four models on 1 seed", ["--models", "linear", "relu", "mlp", "cnn"], ["42"]),
}
CORES = str(machine.usable_cores())
ALONE = "each rank by itself, a rank per core"
WAYS = {
    ALONE: ["--ranks", CORES],
    "from one server, a rank per core": ["--ranks", CORES],
    "from one server, one process": [],
    f"from one server, {CORES} at once": ["--jobs", CORES],
}


class NoServer:
    """Takes a server's place: each process loads everything itself."""

    start = staticmethod(start_process)

    def __init__(self, also: Any = ()):
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass


def compare(way: str, flags: list[str]) -> dict[str, float]:
    """Seconds of a comparison, and what its runs' training and testing take of them."""
    program = [sys.executable, __file__, "--by-themselves"] if way == ALONE else [sys.executable, "-m", "launch.local"]
    with tempfile.TemporaryDirectory() as folder:
        line = [*program, *flags, *WAYS[way], "--runs-dir", f"{folder}/runs", "--out", f"{folder}/report"]
        start = time.perf_counter()
        subprocess.run([*line, "--device", "cpu"], check=True, stdout=subprocess.DEVNULL)
        wall = time.perf_counter() - start
        summaries = [json.loads(path.read_text()) for path in Path(folder).glob("runs/*/summary.json")]
    return {"wall_s": wall, "trained_s": sum(s["time/train_total_s"] + s["time/eval_total_s"] for s in summaries)}


def one_start() -> float:
    """Seconds in which a process loads what a rank needs, and ends."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import torch, accelerate, torch._dynamo"], check=True)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "comparisons.json")
    args = parser.parse_args()
    results = {}
    for case in args.cases:
        name, models, seeds = CASES[case]
        rows: dict[str, list[dict[str, float]]] = {way: [] for way in args.ways}
        for _ in range(args.repeats):
            start = one_start()
            for way, runs in rows.items():
                runs.append(compare(way, [*models, "--seeds", *seeds]) | {"one_start_s": start})
                print(f"{name}, {way}: {runs[-1]['wall_s']:.1f} s", flush=True)
        results[name] = {way: summed_up(runs, rows[args.ways[0]]) for way, runs in rows.items()}
    args.out.write_text(json.dumps(made() | {"cases": results}, indent=1) + "\n")


def summed_up(runs: list[dict[str, float]], first: list[dict[str, float]]) -> dict[str, Any]:
    """Medians, and ratios to the first way's comparison of the same round."""
    ratios = [one["wall_s"] / other["wall_s"] for one, other in zip(runs, first, strict=True)]
    beside = [(one["wall_s"] - one["one_start_s"]) / one["trained_s"] for one in runs]
    found = {"runs": runs, "wall_s": statistics.median(one["wall_s"] for one in runs)}
    return found | {"wall_s_ratio": spread(ratios), "times_what_trained": spread(beside)}


if __name__ == "__main__":
    if sys.argv[1:2] == ["--by-themselves"]:
        local.ForkServer = NoServer  # type: ignore[misc, assignment]
        sys.exit(local.main(sys.argv[2:]))
    main()
