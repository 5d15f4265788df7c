"""Format numbers and tables as text, for markdown and for a terminal. (For the page: report.html.)"""

import html
import re
from typing import Any, NamedTuple

from fashion_ddp.report.statistics import Interval

P_SMALLEST = 0.0001  # of p values that are shown with their digits


class Table(NamedTuple):
    """Column titles, whether each column holds numbers (aligned right), and rows of text."""

    titles: list[str]
    numeric: list[bool]
    rows: list[list[str]]


def percent(value: float) -> str:
    return f"{100 * value:.2f}"


def interval_text(interval: Interval) -> str:
    """Return an interval of fractions as percent or points: `82.10 to 83.60`."""
    return f"{percent(interval.low)} to {percent(interval.high)}"


def p_value_text(p: float) -> str:
    """Return a p value as tables show it."""
    return f"< {P_SMALLEST:.4f}" if p < P_SMALLEST else f"{p:.4f}"


def common_settings(changes: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the settings with the same value in all of `changes`, which holds one dict per run."""
    return {n: value for n, value in changes[0].items() if all(n in other and other[n] == value for other in changes)}


def settings_text(settings: dict[str, Any]) -> str:
    """Return settings as `lr=0.05, epochs=2`."""
    return ", ".join(f"{name}={value}" for name, value in settings.items())


def markdown_text(text: str) -> str:
    """Escape text for one line of markdown, so that GitHub shows it as it is."""
    return " ".join(re.sub(r"([\\`*_\[\]|~])", r"\\\1", html.escape(text, quote=False)).split())


def markdown_table(table: Table) -> str:
    rule = ["---:" if numeric else ":---" for numeric in table.numeric]
    titles, *rows = ([markdown_text(cell) for cell in row] for row in (table.titles, *table.rows))
    lines = [titles, rule, *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def terminal_table(table: Table) -> str:
    widths = [max(map(len, column)) for column in zip(table.titles, *table.rows, strict=True)]

    def line(cells: list[str]) -> str:
        placed = zip(cells, widths, table.numeric, strict=True)
        return "  ".join(c.rjust(w) if numeric else c.ljust(w) for c, w, numeric in placed).rstrip()

    return "\n".join(map(line, [table.titles, *table.rows]))
