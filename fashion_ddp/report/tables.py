"""The report's tables as text: made here once, placed by the page, the markdown and the terminal."""

import html
import re
import shlex
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

from fashion_ddp.report.results import ACCURACY, IMAGES_PER_S, LOSS, SECONDS
from fashion_ddp.report.rows import Comparison, Row, Section

PLUS_MINUS = "\N{PLUS-MINUS SIGN}"
ABSENT = "-"


class Table(NamedTuple):
    """Column titles, which columns hold numbers (set flush right), and rows of text."""

    titles: list[str]
    numeric: list[bool]
    rows: list[list[str]]


class Column(NamedTuple):
    title: str
    numeric: bool
    text: Callable[[Row], str]
    spread: Callable[[Row], str] | None = None  # of a figure that has a standard deviation over seeds


def percent(value: float) -> str:
    return f"{100 * value:.2f}"


def _figure(title: str, name: str, text: Callable[[float], str], spreads: bool = False) -> Column:
    """The column of a figure of the summary: its mean and, if asked for, its standard deviation."""

    def mean(row: Row) -> str:
        value = row.mean(name)
        if value is None:
            return "not finite" if all(name in r.record for r in row.results) else ABSENT
        return text(value)

    def spread(row: Row) -> str:
        value = row.std(name)
        return "" if value is None else f"{PLUS_MINUS} {text(value)}"

    return Column(title, True, mean, spread if spreads else None)


def _seeds(row: Row) -> str:
    seeds = ", ".join(str(r.record["seed"]) for r in row.results)
    return f"{seeds} (n={len(row.results)})" if len(row.results) > 1 else seeds


RUN_COLUMN = Column("run", False, lambda row: row.first.name)
IDENTITY = [
    Column("model", False, lambda row: row.first.model + (" SYNTHETIC" if row.first.synthetic else "")),
    Column("recipe", False, lambda row: ", ".join(p for p in (row.first.recipe, row.first.changed) if p)),
    Column("seed", False, _seeds),
]
QUALITY = [
    _figure("accuracy %", ACCURACY, percent, spreads=True),
    _figure("loss", LOSS, "{:.4f}".format, spreads=True),
]
SIZE = [
    _figure("parameters", "parameters", "{:,.0f}".format),
    _figure("FLOPs per image", "flops_per_image", "{:,.0f}".format),
]
TIME = _figure("training time s", SECONDS, "{:.2f}".format, spreads=True)
SPEED = _figure("images/s", IMAGES_PER_S, "{:,.0f}".format)
PLACE = Column("ranks x device", False, lambda row: row.first.place)
COLUMNS = [*IDENTITY, *QUALITY, *SIZE, TIME, SPEED, PLACE]


def _table(columns: list[Column], rows: list[Row]) -> Table:
    """A column of standard deviations follows a figure that has any."""
    shown: list[Column] = []
    for column in columns:
        shown.append(column)
        if column.spread and any(map(column.spread, rows)):
            shown.append(Column("std", True, column.spread))
    cells = [[column.text(row) for column in shown] for row in rows]
    return Table([c.title for c in shown], [c.numeric for c in shown], cells)


def main_table(section: Section) -> Table:
    """One line per row of the section, best accuracy first."""
    return _table(COLUMNS, section.rows)


def single_runs(section: Section) -> Table | None:
    """One line per run; None where the main table is that already."""
    if all(len(row.results) == 1 for row in section.rows):
        return None
    return _table([RUN_COLUMN, *COLUMNS], [Row(row.label, [r]) for row in section.rows for r in row.results])


def published_table(section: Section) -> Table | None:
    """Our figures and the tutorials', for rows with the recipe's own settings; None without any."""
    lines = []
    for row in section.rows:
        if theirs := row.first.record["published"]:
            model, recipe, seeds = (column.text(row) for column in IDENTITY)
            ours = [column.text(row) for column in (*QUALITY, TIME, PLACE)]
            lines.append([model, recipe, f"this report, seed {seeds}", *ours])
            lines.append([model, recipe, theirs["source"], *_published(theirs), theirs["hardware"]])
    titles = ["model", "recipe", "source", *(c.title for c in (*QUALITY, TIME)), "hardware"]
    return Table(titles, [False, False, False, True, True, True, False], lines) if lines else None


def _published(theirs: dict[str, Any]) -> list[str]:
    """Accuracy, loss and time with as many digits as were published."""
    about, digits = ("~", (0, 2, 0)) if theirs["approximate"] else ("", (2, 4, 2))
    values = 100 * theirs["accuracy"], theirs["loss"], theirs["seconds"]
    return [ABSENT if v is None else f"{about}{v:.{d}f}" for v, d in zip(values, digits, strict=True)]


def unfinished_table(comparison: Comparison) -> Table | None:
    """Runs that are not ranked, with what their folders say of why; None without any."""
    names = ["name", "model", "recipe", "seed", "status", "epoch", "step", "error"]
    known = [[r.record.get(name) for name in names] for r in comparison.unfinished]
    rows = [[ABSENT if value is None else str(value) for value in values] for values in known]
    return Table(["run", *names[1:]], [name in ("epoch", "step") for name in names], rows) if rows else None


# --- Environment ------------------------------------------------------------------------------------------------


def environment_tables(comparison: Comparison) -> tuple[Table, Table]:
    """What all runs were started in alike (name, value), and what differs (a line per run, a column per name)."""
    started = {r.name: _flat(r.start) | {"starts": str(len(r.run.environment))} for r in comparison.results}
    names = list(dict.fromkeys(name for values in started.values() for name in values))
    alike = [n for n in names if len({values.get(n) for values in started.values()}) == 1]
    others = [n for n in names if n not in alike]
    common = started[comparison.results[0].name]
    rows = [[run, *(values.get(n, ABSENT) for n in others)] for run, values in started.items()]
    return (
        Table(["name", "value"], [False, False], [[n, common[n]] for n in alike]),
        Table(["run", *others], [False] * (1 + len(others)), rows),
    )


def _flat(values: dict[str, Any], above: str = "") -> dict[str, str]:
    """Nested mappings as one, `outer/inner`, with each value as text."""
    flat: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{above}{name}/")
        else:
            flat[above + name] = shlex.join(map(str, value)) if name == "command" else _brief(value)
    return flat


def _brief(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_brief(inner)}" for name, inner in value.items())
    if isinstance(value, list):  # most often one entry per rank
        return "; ".join(f"{n} x {text}" if n > 1 else text for text, n in Counter(map(_brief, value)).items())
    if value is None:
        return ABSENT
    return re.sub(r"\b([0-9a-f]{12})[0-9a-f]{20,}\b", r"\1", str(value))  # a hash: its first digits tell it apart


# --- Markdown and terminal --------------------------------------------------------------------------------------


def markdown_text(text: str) -> str:
    """Text in one line that GitHub shows as it is."""
    return " ".join(re.sub(r"([\\`*_\[\]|~])", r"\\\1", html.escape(text, quote=False)).split())


def markdown_table(table: Table) -> str:
    rule = ["---:" if numeric else ":---" for numeric in table.numeric]
    lines = [table.titles, rule, *([markdown_text(cell) for cell in row] for row in table.rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def terminal_table(table: Table) -> str:
    widths = [max(map(len, column)) for column in zip(table.titles, *table.rows, strict=True)]

    def line(cells: list[str]) -> str:
        placed = zip(cells, widths, table.numeric, strict=True)
        return "  ".join(c.rjust(w) if numeric else c.ljust(w) for c, w, numeric in placed).rstrip()

    return "\n".join(map(line, [table.titles, *table.rows]))
