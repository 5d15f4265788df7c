"""Compare the runs at the end of a submission, say which are missing, and rank a sweep."""

import sys
from pathlib import Path

from fashion_ddp import compare
from fashion_ddp.errors import UserError
from fashion_ddp.files import write_whole
from fashion_ddp.report import rows
from fashion_ddp.report.results import Result, read_results
from fashion_ddp.report.text import Table, markdown_table, percent, terminal_table
from launch import accounting

VALIDATION = "val/accuracy"


def compare_runs(folders: list[Path], out: Path, ranked: bool) -> str:
    """Write the report on these runs into the folder `out`. Then exit with 1 where a run is missing or not finished."""
    existing = [folder for folder in folders if (folder / "config.yaml").is_file()]
    if not existing:
        raise UserError("none of the runs is there: nothing can be compared")
    accounting.write_costs(existing)  # before the comparison reads it
    compare.main([*map(str, existing), "--out", str(out)])
    results = read_results(existing)
    if ranked and (table := ranking(results)):
        title = f"The sweep, by {VALIDATION}: the mean over seeds"
        print(f"\n{title}\n{terminal_table(table)}")
        write_whole(out / "sweep.md", f"# {title}\n\n{markdown_table(table)}")
    missing = [f"{r.name} ({r.record['status']})" for r in results if not r.finished]
    missing += [f"{folder.name} (removed)" for folder in folders if folder not in existing]
    if missing:
        print(f"PARTIAL: of {len(folders)} runs {len(missing)} are not finished: {', '.join(missing)}")
        print("`python -m launch.status resubmit` submits these again", flush=True)
        sys.exit(1)
    return "complete"


def ranking(results: list[Result]) -> Table | None:
    """Rank the finished runs by their accuracy on the validation set; None where no run has one.

    The validation set is held out from training. A choice may rest on it, and not on the test set.
    """
    sections = rows.compare(results).sections
    ranked = [row for section in sections for row in section.rows if row.mean(VALIDATION) is not None]
    if not ranked:
        return None
    ranked.sort(key=lambda row: -(row.mean(VALIDATION) or 0.0))
    several_seeds = any(row.std(VALIDATION) is not None for row in ranked)
    titles = ["", "what", "n", f"{VALIDATION} %", *["std"] * several_seeds, "val/loss", "test/accuracy %"]
    lines = [_line(place, row, several_seeds) for place, row in enumerate(ranked, start=1)]
    return Table(titles, [True, False, *[True] * (len(titles) - 2)], lines)


def _line(place: int, row: rows.Row, with_std: bool) -> list[str]:
    std = row.std(VALIDATION)
    loss, test = row.mean("val/loss"), row.mean("test/accuracy")
    figures = [percent(row.mean(VALIDATION) or 0.0)] + [percent(std) if std is not None else "-"] * with_std
    figures += ["-" if loss is None else f"{loss:.4f}", "-" if test is None else percent(test)]
    return [str(place), row.label, str(len(row.results)), *figures]
