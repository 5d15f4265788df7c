"""Make the report's tables, which the page, the markdown and the terminal show."""

import re
import shlex
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from fashion_ddp.errors import pluralize
from fashion_ddp.report.results import (
    ACCURACY,
    BALANCED,
    CALIBRATION,
    IMAGES_PER_S,
    LOSS,
    MACRO_F1,
    MEMORY,
    SECONDS,
    TOP5,
    TTA,
    own_figures,
)
from fashion_ddp.report.rows import Comparison, Row, Section
from fashion_ddp.report.text import Table, interval_text, p_value_text, percent, settings_text

PLUS_MINUS = "\N{PLUS-MINUS SIGN}"
BEST = "\N{BLACK STAR} "  # precedes the model of the row that is significantly better than all others
MISSING = "-"
BY_CLASS = 6  # rows whose figures are shown by class
ALL_PAIRS = 5  # with more rows than this, only pairs with the first row are shown


class Column(NamedTuple):
    title: str
    numeric: bool
    text: Callable[[Row], str]
    spread: Callable[[Row], str] | None = None  # the figure's standard deviation over seeds


def _interval(row: Row) -> str:
    interval = row.interval()
    return interval_text(interval) if interval else MISSING


def _figure(title: str, name: str, text: Callable[[float], str], spreads: bool = False) -> Column:
    """Return the column of a figure of the summary: its mean, and its standard deviation if `spreads`."""

    def mean(row: Row) -> str:
        value = row.mean(name)
        if value is None:
            return "not finite" if all(name in r.record for r in row.results) else MISSING
        return text(value)

    def spread(row: Row) -> str:
        value = row.std(name)
        return "" if value is None else f"{PLUS_MINUS} {text(value)}"

    return Column(title, True, mean, spread if spreads else None)


def _seeds(row: Row) -> str:
    return f"{', '.join(str(r.record['seed']) for r in row.results)} ({pluralize(len(row.results), 'seed')})"


def _shared(row: Row) -> str:
    return f"{' or '.join(map(str, row.concurrent_runs))} runs" if row.shared else MISSING


def _test_evaluations(row: Row) -> str:
    times = sorted({r.test_evaluations for r in row.results})
    return " or ".join(f"{n:,} x" for n in times)


def _kept(row: Row) -> str:
    epochs = [str(r.kept_epoch) for r in row.results if r.kept_epoch is not None]
    return ", ".join(epochs) or MISSING


RUN_COLUMN = Column("run", False, lambda row: row.first.name)
MODEL = Column("model", False, lambda row: row.first.model + (" SYNTHETIC" if row.first.synthetic else ""))
RECIPE = Column(
    "recipe", False, lambda row: ", ".join(filter(None, (row.first.recipe, settings_text(row.first.changed))))
)
SEED = Column("seed", False, _seeds)
QUALITY = [
    _figure("accuracy %", ACCURACY, percent, spreads=True),
    _figure("loss", LOSS, "{:.4f}".format, spreads=True),
]
AUGMENTED = _figure("accuracy % with test-time augmentation", TTA, percent, spreads=True)
EVALUATIONS = Column("test set seen", True, _test_evaluations)
KEPT = Column("epoch kept, by validation", True, _kept)
INTERVAL = Column("95 % interval", True, _interval)
OVER_CLASSES = _figure("balanced accuracy %", BALANCED, percent, spreads=True)
AMONG_FIVE = _figure("top-5 accuracy %", TOP5, percent)
MORE_QUALITY = [
    AMONG_FIVE,
    _figure("macro F1", MACRO_F1, "{:.4f}".format),
    _figure("calibration error %", CALIBRATION, percent),
]
PARAMETERS = _figure("parameters", "parameters", "{:,.0f}".format)
FLOPS = _figure("FLOPs per image", "flops_per_image", "{:,.0f}".format)
TIME = _figure("training time s", SECONDS, "{:.2f}".format, spreads=True)
SPEED = _figure("images/s", IMAGES_PER_S, "{:,.0f}".format)
SHARED = Column("times shared by", False, _shared)
SPACE = _figure("memory MB", MEMORY, lambda value: f"{value / 1e6:,.0f}")
RANKS_AND_DEVICE = Column("ranks x device", False, lambda row: row.first.ranks_and_device)
COLUMNS = [RECIPE, QUALITY[0], INTERVAL, SEED, EVALUATIONS, KEPT, AUGMENTED, OVER_CLASSES, QUALITY[1], *MORE_QUALITY]
COLUMNS += [PARAMETERS, FLOPS, TIME, SPEED, SHARED, SPACE, RANKS_AND_DEVICE]
# A terminal has less room.
TERMINAL_COLUMNS = [
    RECIPE,
    QUALITY[0],
    INTERVAL,
    SEED,
    KEPT,
    AUGMENTED,
    QUALITY[1],
    PARAMETERS,
    TIME,
    SPEED,
    SHARED,
    RANKS_AND_DEVICE,
]


def _table(section: Section, columns: list[Column], rows: list[Row]) -> Table:
    """Make a table of rows, or runs, of a section. A column that need not have an entry is left out where none has."""
    shown: list[Column] = []
    for column in columns:
        if column in (SHARED, KEPT, AUGMENTED, AMONG_FIVE) and all(column.text(row) == MISSING for row in rows):
            continue
        if (column is EVALUATIONS and not section.offers_choice) or (column is OVER_CLASSES and not section.unbalanced):
            continue
        shown.append(column)
        if column.spread and any(map(column.spread, rows)):
            shown.append(Column("std", True, column.spread))
    cells = [[column.text(row) for column in shown] for row in rows]
    return Table([c.title for c in shown], [c.numeric for c in shown], cells)


def _all_columns(section: Section) -> list[Column]:
    """Return our columns, and after those of quality one for each figure of the user's own."""
    after = COLUMNS.index(MORE_QUALITY[-1]) + 1
    names = own_figures([result for row in section.rows for result in row.results])
    own = [_figure(name.removeprefix("test/"), name, "{:.4f}".format) for name in names]
    return [*COLUMNS[:after], *own, *COLUMNS[after:]]


def main_table(section: Section, columns: list[Column] | None = None) -> Table:
    """Return a table with a line per row of the section, best accuracy first. `columns`: by default all."""

    def model(row: Row) -> str:
        return (BEST if row is section.best else "") + MODEL.text(row)

    return _table(section, [MODEL._replace(text=model), *(columns or _all_columns(section))], section.rows)


def single_runs(section: Section) -> Table | None:
    """Return a table with a line per run; None where the main table already is that."""
    if all(len(row.results) == 1 for row in section.rows):
        return None
    runs = [Row(row.label, [result]) for row in section.rows for result in row.results]
    return _table(section, [RUN_COLUMN, MODEL, *_all_columns(section)], runs)


def pairs_table(section: Section) -> Table | None:
    """Return the tests of pairs of rows, which show whether differences are real; None without any."""
    everything = len(section.rows) <= ALL_PAIRS
    lines = [
        [section.rows[a].label, section.rows[b].label, percent(pair.difference), interval_text(pair.interval)]
        + [f"{pair.only_first:,}", f"{pair.only_second:,}", p_value_text(pair.p), p_value_text(pair.p_holm)]
        for (a, b), pair in section.pairs.items()
        if everything or a == 0
    ]
    titles = ["higher", "lower", "points", "95 % interval", "only higher right", "only lower right", "p", "p, Holm"]
    return Table(titles, [False, False, *[True] * 6], lines) if lines else None


def settings_table(section: Section) -> Table | None:
    """Return the settings that differ between the rows of a section; None where none does."""
    settings = [
        {name: _short_text(value) for name, value in row.first.record["settings"].items()} for row in section.rows
    ]
    names = [n for n in settings[0] if n not in ("model", "seed") and len({s.get(n) for s in settings}) > 1]
    lines = [[row.label, *(s.get(n, MISSING) for n in names)] for row, s in zip(section.rows, settings, strict=True)]
    return Table(["row", *names], [False] * (1 + len(names)), lines) if names else None


def class_table(section: Section) -> Table | None:
    """Return, of each class, its images, and recall and F1 of the best rows, the mean over their runs; None where no
    row has predictions."""
    shown = [row for row in section.rows if row.by_class("recall") is not None][:BY_CLASS]
    if not shown:
        return None
    first = shown[0].first
    columns = {"class": first.classes}
    if known := first.record.get("training_images_by_class"):
        columns["training images"] = [f"{count:,}" for count in known]
    columns["test images"] = [f"{sum(counts):,}" for counts in first.record["confusion"]]
    for row in shown:
        columns[f"{row.label}: recall %"] = [percent(value) for value in row.by_class("recall") or []]
        columns[f"{row.label}: F1"] = [f"{value:.2f}" for value in row.by_class("f1") or []]
    lines = [list(line) for line in zip(*columns.values(), strict=True)]
    return Table([*columns], [False, *[True] * (len(columns) - 1)], lines)


def most_confused(row: Row, most: int = 5) -> list[tuple[int, int, int, float]]:
    """Return the row's most confused pairs: true class, predicted class, images over all runs, share of true class."""
    counts = row.confusion()
    if counts is None:
        return []
    wrong = counts - np.diag(counts.diagonal())
    order = np.argsort(-wrong, axis=None, kind="stable")[:most]
    pairs = [divmod(int(flat), len(counts)) for flat in order]
    return [(t, p, int(wrong[t, p]), float(wrong[t, p] / counts[t].sum())) for t, p in pairs if wrong[t, p]]


def confused_table(section: Section) -> Table | None:
    """Return the five most confused pairs of each row; None where no row has any."""
    lines = [
        [row.label, f"{row.first.classes[t]} -> {row.first.classes[p]}", f"{count:,}", f"{100 * share:.1f}"]
        for row in section.rows
        for t, p, count, share in most_confused(row)
    ]
    return (
        Table(["row", "true -> predicted", "images", "% of the class"], [False, False, True, True], lines)
        if lines
        else None
    )


def tutorials_table(section: Section) -> Table | None:
    """Return our figures beside the tutorials', for rows with the recipe's own settings; None without any."""
    lines = []
    for row in section.rows:
        if theirs := row.first.record["published"]:
            model, recipe, seeds = (column.text(row) for column in (MODEL, RECIPE, SEED))
            ours = [column.text(row) for column in (*QUALITY, TIME)]
            hardware = f"{row.first.record.get('world_size', '?')} x {row.first.device}"
            hardware += f", times shared by {SHARED.text(row)}" if row.shared else ""
            lines.append([model, recipe, f"this report, seed {seeds}", *ours, hardware])
            lines.append([model, recipe, theirs["source"], *_tutorial_figures(theirs), theirs["hardware"]])
    titles = ["model", "recipe", "source", *(c.title for c in (*QUALITY, TIME)), "hardware"]
    return Table(titles, [False, False, False, True, True, True, False], lines) if lines else None


def _tutorial_figures(theirs: dict[str, Any]) -> list[str]:
    """Return accuracy, loss and time with as many digits as the tutorials published."""
    about, digits = ("~", (0, 2, 0)) if theirs["approximate"] else ("", (2, 4, 2))
    values = 100 * theirs["accuracy"], theirs["loss"], theirs["seconds"]
    return [MISSING if v is None else f"{about}{v:.{d}f}" for v, d in zip(values, digits, strict=True)]


def unfinished_table(comparison: Comparison) -> Table | None:
    """Return the runs that are not ranked, with the reason from their folders; None without any."""
    names = ["name", "model", "recipe", "seed", "status", "epoch", "step", "error"]
    known = [[r.record.get(name) for name in names] for r in comparison.unfinished]
    rows = [[MISSING if value is None else str(value) for value in values] for values in known]
    return Table(["run", *names[1:]], [name in ("epoch", "step") for name in names], rows) if rows else None


# --- Cost on a cluster --------------------------------------------------------------------------------------------

# Of a submitted run: a column's title, the figure in cost.json, and how much of its unit is one of the column's.
COSTS = [
    ("core hours", "cost/core_hours", 1),
    ("card hours", "cost/card_hours", 1),
    ("queued min", "cost/queued_s", 60),
    ("starting min", "cost/starting_s", 60),
    ("training min", "cost/training_s", 60),
    ("repeated min", "cost/repeated_s", 60),
    ("energy kWh", "cost/energy_j", 3.6e6),
]


def cost_table(comparison: Comparison) -> Table | None:
    """Return what the submitted runs cost: a line per row of the sections, with the sum over its runs, and one per run
    that is not finished; None without any. A figure that no run has is left out."""
    several = len(comparison.sections) > 1
    groups = [
        (f"{row.label}, {section.title}" if several else row.label, row.results)
        for section in comparison.sections
        for row in section.rows
    ]
    groups += [(f"{r.name} ({r.record['status']})", [r]) for r in comparison.unfinished]
    costing = [(label, costs) for label, results in groups if (costs := [r.run.cost for r in results if r.run.cost])]
    shown = [column for column in COSTS if any(column[1] in cost for _, costs in costing for cost in costs)]
    lines = [
        [label, str(len(costs)), str(sum(cost["cost/starts"] for cost in costs))]
        + [_total(costs, name, unit) for _, name, unit in shown]
        for label, costs in costing
    ]
    titles = ["row", "runs", "starts", *(title for title, *_ in shown)]
    return Table(titles, [False, *[True] * (len(titles) - 1)], lines) if lines else None


def _total(costs: list[dict[str, Any]], name: str, unit: float) -> str:
    values = [cost.get(name) for cost in costs]
    known = [value for value in values if value is not None]
    return f"{sum(known) / unit:,.2f}" if len(known) == len(values) else MISSING


# --- Environment ------------------------------------------------------------------------------------------------


def environment_tables(comparison: Comparison) -> tuple[Table, Table]:
    """Return what all runs' environments have in common (name, value), and what differs (a line per run)."""
    started = {r.name: _flatten(r.start) | {"starts": str(len(r.run.environment))} for r in comparison.results}
    names = list(dict.fromkeys(name for values in started.values() for name in values))
    common_names = [n for n in names if len({values.get(n) for values in started.values()}) == 1]
    others = [n for n in names if n not in common_names]
    common = started[comparison.results[0].name]
    rows = [[run, *(values.get(n, MISSING) for n in others)] for run, values in started.items()]
    return (
        Table(["name", "value"], [False, False], [[n, common[n]] for n in common_names]),
        Table(["run", *others], [False] * (1 + len(others)), rows),
    )


def _flatten(values: dict[str, Any], above: str = "") -> dict[str, str]:
    """Return nested mappings as one, with keys `outer/inner` and values as text."""
    flat: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{above}{name}/")
        else:
            flat[above + name] = shlex.join(map(str, value)) if name == "command" else _short_text(value)
    return flat


def _short_text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_short_text(inner)}" for name, inner in value.items())
    if isinstance(value, list):  # usually one entry per rank
        return "; ".join(f"{n} x {text}" if n > 1 else text for text, n in Counter(map(_short_text, value)).items())
    if value is None:
        return MISSING
    return re.sub(r"\b([0-9a-f]{12})[0-9a-f]{20,}\b", r"\1", str(value))  # a hash: its first digits identify it
