"""Compare training runs in one report: python -m fashion_ddp.compare runs --out report

Writes report.html (one file that needs no other), report.md, report.json and runs.csv, and prints the table.
"""

import csv
import io
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from fashion_ddp.console import broken_pipe_ok, fail, say
from fashion_ddp.errors import UserError
from fashion_ddp.files import write_whole
from fashion_ddp.redact import restrict_umask
from fashion_ddp.report import sentences, tables
from fashion_ddp.report.page import html_page, markdown_page
from fashion_ddp.report.results import read_results
from fashion_ddp.report.rows import Comparison, compare
from fashion_ddp.report.text import terminal_table
from fashion_ddp.runs.reading import find_runs


@dataclass(frozen=True)
class Command:
    """Compare training runs in one report."""

    runs: tyro.conf.Positional[tuple[Path, ...]] = (Path(os.environ.get("FASHION_DDP_RUNS_DIR", "runs")),)
    """Run folders, or folders of run folders."""
    out: Path = Path("report")
    """Folder to write to; of what it holds, only the report's own four files are replaced."""


def report_json(comparison: Comparison) -> dict[str, Any]:
    """Return all numbers of the page by run, by row (runs that differ only in the seed) and by pair of rows, and the
    verdicts."""
    verdicts = [{"dataset": s.title, "verdict": " ".join(sentences.verdict(s))} for s in comparison.sections]
    return {"verdicts": verdicts} | comparison.as_json()


def csv_rows(comparison: Comparison) -> str:
    """Return a line of CSV per run, with all single values of its object in report.json."""
    rows = [
        {name: _no_formula(value) for name, value in r.record.items() if not isinstance(value, dict | list)}
        for r in comparison.results
    ]
    file = io.StringIO()
    writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def _no_formula(value: Any) -> Any:
    """Mark text that a spreadsheet would run as a formula as text (source: OWASP, CSV injection)."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value


def terminal_text(comparison: Comparison) -> str:
    """Return the short tables, each with its verdict below."""
    parts = []
    for section in comparison.sections:
        table = terminal_table(tables.main_table(section, tables.TERMINAL_COLUMNS))
        text = " ".join(part for part in (*sentences.verdict(section), sentences.shared_times(section)) if part)
        parts.append(f"{section.title}\n{table}\n\n{text}")
    if unfinished := tables.unfinished_table(comparison):
        parts.append(f"not finished, not ranked\n{terminal_table(unfinished)}")
    return "\n\n".join(parts)


def write(comparison: Comparison, out: Path) -> None:
    """Write the report's four files. Raises UserError where `out` cannot be written."""
    files = {
        "report.json": json.dumps(report_json(comparison), indent=1, allow_nan=False) + "\n",
        "runs.csv": csv_rows(comparison),
        "report.md": markdown_page(comparison),
        "report.html": html_page(comparison),
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            write_whole(out / name, content)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}): choose another --out") from None


def main(argv: list[str] | None = None) -> None:
    restrict_umask()
    with broken_pipe_ok():
        command = tyro.cli(Command, prog="python -m fashion_ddp.compare", args=argv)
    try:
        comparison = compare(read_results(find_runs(list(command.runs))))
        write(comparison, command.out)
    except UserError as error:
        fail(error, 2)
    say(terminal_text(comparison))
    say(f"\nreport: {command.out / 'report.html'}")


if __name__ == "__main__":
    main(sys.argv[1:])
