"""The comparison at the end of a submission: of what there is, saying what is missing; and the ranking of a sweep."""

import sys
from pathlib import Path

from fashion_ddp import compare
from fashion_ddp.errors import UserError
from fashion_ddp.files import write_whole
from fashion_ddp.report.results import Result, read_results
from fashion_ddp.report.rows import Row
from fashion_ddp.report.rows import compare as compared
from fashion_ddp.report.text import Table, markdown_table, percent, terminal_table

VALIDATION = "val/accuracy"


def write(folders: list[Path], out: Path, ranked: bool) -> str:
    """Compare runs into the folder `out`. Exits with 1, when that is done, where a run is missing or not finished."""
    there = [folder for folder in folders if (folder / "config.yaml").is_file()]
    if not there:
        raise UserError("none of the runs is there: nothing can be compared")
    compare.main([*map(str, there), "--out", str(out)])
    results = read_results(there)
    if ranked and (table := ranking(results)):
        title = f"The sweep, by {VALIDATION}: the mean over seeds"
        print(f"\n{title}\n{terminal_table(table)}")
        write_whole(out / "sweep.md", f"# {title}\n\n{markdown_table(table)}")
    missing = [f"{r.name} ({r.record['status']})" for r in results if not r.finished]
    missing += [f"{folder.name} (removed)" for folder in folders if folder not in there]
    if missing:
        print(f"PARTIAL: of {len(folders)} runs {len(missing)} are not finished: {', '.join(missing)}")
        print("`python -m launch.status resubmit` submits these again", flush=True)
        sys.exit(1)
    return "complete"


def ranking(results: list[Result]) -> Table | None:
    """What was trained, by its accuracy on held-out training images: what a choice may rest on, unlike the test set's.

    None where no run held any out.
    """
    sections = compared(results).sections
    rows = [row for section in sections for row in section.rows if row.mean(VALIDATION) is not None]
    if not rows:
        return None
    rows.sort(key=lambda row: -(row.mean(VALIDATION) or 0.0))
    spread = any(row.std(VALIDATION) is not None for row in rows)
    titles = ["", "what", "n", f"{VALIDATION} %", *["std"] * spread, "val/loss", "test/accuracy %"]
    lines = [_line(place, row, spread) for place, row in enumerate(rows, start=1)]
    return Table(titles, [True, False, *[True] * (len(titles) - 2)], lines)


def _line(place: int, row: Row, spread: bool) -> list[str]:
    std = row.std(VALIDATION)
    loss, test = row.mean("val/loss"), row.mean("test/accuracy")
    figures = [percent(row.mean(VALIDATION) or 0.0)] + [percent(std) if std is not None else "-"] * spread
    figures += ["-" if loss is None else f"{loss:.4f}", "-" if test is None else percent(test)]
    return [str(place), row.label, str(len(row.results)), *figures]
