"""Runs as pandas frames: one row per run, and one row per epoch of every run.

    python examples/read_runs.py runs
    python examples/read_runs.py runs/cnn-* --by recipe model       means over seeds

pandas is no dependency of fashion_ddp: pip install pandas.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from fashion_ddp import load_run
from fashion_ddp.errors import UserError
from fashion_ddp.runs.reading import find_runs

COLUMNS = ["model", "recipe", "seed", "status", "test/accuracy", "test/loss", "parameters", "time/train_total_s"]


def of_runs(folders: list[Path]) -> list[dict[str, Any]]:
    """One row per run: its settings and, over them, what its summary has as single values."""
    rows = []
    for folder in folders:
        run = load_run(folder)
        single = {name: value for name, value in run.summary.items() if not isinstance(value, dict | list)}
        rows.append({"run": run.path.name, **run.config, **single})
    return rows


def of_epochs(folders: list[Path]) -> list[dict[str, Any]]:
    """One row per epoch of every run."""
    return [{"run": folder.name, **row} for folder in folders for row in load_run(folder).metrics]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("runs", type=Path, nargs="*", default=[Path("runs")], help="run folders, or folders of them")
    parser.add_argument("--by", nargs="+", default=[], metavar="KEY", help="mean of the figures over equal keys")
    given = parser.parse_args(argv)
    try:
        import pandas
    except ImportError:
        print("error: pandas is not installed: pip install pandas", file=sys.stderr)
        return 2
    try:
        folders = find_runs(given.runs)
        runs, epochs = pandas.DataFrame(of_runs(folders)), pandas.DataFrame(of_epochs(folders))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    table = runs.reindex(columns=["run", *COLUMNS]).set_index("run")
    if given.by:
        table = runs.groupby(given.by)[["test/accuracy", "test/loss"]].agg(["count", "mean", "std"])
    print(table.to_string())
    print(f"\n{len(epochs)} epochs; the last of each run:")
    last = epochs.groupby("run").last() if len(epochs) else epochs
    print(last.reindex(columns=["epoch", "train/loss", "test/loss", "test/accuracy"]).to_string())
    return 0


if __name__ == "__main__":
    sys.exit(main())
