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

import jinja2
import tyro

from fashion_ddp.console import fail, say
from fashion_ddp.errors import UserError
from fashion_ddp.private import keep_others_out
from fashion_ddp.report import figures, sentences, tables
from fashion_ddp.report.results import read_results
from fashion_ddp.report.rows import Comparison, compare
from fashion_ddp.rundir import find_runs, write_whole

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Command:
    """Compare training runs in one report."""

    runs: tyro.conf.Positional[tuple[Path, ...]] = (Path(os.environ.get("FASHION_DDP_RUNS_DIR", "runs")),)
    """Run folders, or folders of run folders."""
    out: Path = Path("report")
    """Folder to write to; of what it holds, only the report's own four files are replaced."""


def html_page(comparison: Comparison) -> str:
    colours = figures.model_colours(comparison.finished)
    sections = [
        {
            "section": section,
            "main": tables.main_table(section),
            "published": tables.published_table(section),
            "single": tables.single_runs(section),
            "bars": figures.accuracy_bars(section, colours),
            "curves": figures.learning_curves(section, colours),
            "confusion": figures.confusion_matrices(section),
        }
        for section in comparison.sections
    ]
    common, differing = tables.environment_tables(comparison)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE / "report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html").render(
        title=sentences.title(comparison),
        headline=sentences.headline(comparison),
        sections=sections,
        unfinished=tables.unfinished_table(comparison),
        notes=sentences.notes(comparison),
        common=common,
        differing=differing,
    )


def markdown_page(comparison: Comparison) -> str:
    text, table = tables.markdown_text, tables.markdown_table
    parts = [f"# {text(sentences.title(comparison))}\n", text(sentences.headline(comparison)) + "\n"]
    for section in comparison.sections:
        parts += [f"## {text(section.title)}\n", table(tables.main_table(section))]
        if published := tables.published_table(section):
            parts += ["### Beside the tutorials' published figures\n", table(published)]
        if single := tables.single_runs(section):
            parts += ["### Single runs\n", table(single)]
    if unfinished := tables.unfinished_table(comparison):
        parts += ["## Not finished, not ranked\n", table(unfinished)]
    parts += ["## Notes\n", "".join(f"- {text(note)}\n" for note in sentences.notes(comparison))]
    return "\n".join(parts)


def csv_rows(comparison: Comparison) -> str:
    """One line per run: what of its object in report.json is a single value."""
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
    """Text that a spreadsheet would run as a formula, marked as text (OWASP, CSV injection)."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value


def terminal_text(comparison: Comparison) -> str:
    shown = [(section.title, tables.main_table(section)) for section in comparison.sections]
    if unfinished := tables.unfinished_table(comparison):
        shown.append(("not finished, not ranked", unfinished))
    return "\n\n".join(f"{heading}\n{tables.terminal_table(table)}" for heading, table in shown)


def write(comparison: Comparison, out: Path) -> None:
    """Write the four files. Raises UserError where `out` cannot be written."""
    files = {
        "report.json": json.dumps(comparison.as_json(), indent=1, allow_nan=False) + "\n",
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
    keep_others_out()
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
