"""Compare training runs in one report: python -m fashion_ddp.compare runs --out report

Writes report.html (one file that needs no other), report.md, report.json and runs.csv, and prints the table.
"""

import csv
import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fashion_ddp.config import default_runs_dir, flags
from fashion_ddp.console import entry_point, say
from fashion_ddp.errors import UserError
from fashion_ddp.files import write_whole
from fashion_ddp.report import sentences, tables
from fashion_ddp.report.page import html_page, markdown_page
from fashion_ddp.report.results import read_results
from fashion_ddp.report.rows import Comparison, compare
from fashion_ddp.report.text import terminal_table
from fashion_ddp.runs.reading import find_runs


@dataclass(frozen=True)
class Arguments:
    """Compare training runs in one report."""

    runs: flags.Positional[tuple[Path, ...]] = field(default_factory=lambda: (default_runs_dir(),))
    """Run folders, or folders of run folders."""
    out: Path = Path("report")
    """Folder of the report. Of the files in it, only the report's own four are replaced."""


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
        text = " ".join((*sentences.verdict(section), *sentences.caveats(section)))
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


@entry_point
def main(argv: list[str] | None = None) -> None:
    arguments = flags.parse(Arguments, "fashion_ddp.compare", argv)
    comparison = compare(read_results(find_runs(list(arguments.runs))))
    write(comparison, arguments.out)
    say(terminal_text(comparison))
    say(f"\nreport: {arguments.out / 'report.html'}")


if __name__ == "__main__":
    main()
