"""The report's figures as inline SVG: they take the page's font and ink, so they read on light and on dark.

Colours are Okabe and Ito's (https://jfly.uni-koeln.de/color/), told apart by the colour-blind; yellow and black are
left out, which vanish on a light or a dark page.
"""

import io
import math
import re
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from fashion_ddp.report.results import ACCURACY, Result
from fashion_ddp.report.rows import Row, Section
from fashion_ddp.report.tables import percent

BLUE, VERMILLION = "#0072B2", "#D55E00"
COLOURS = (BLUE, "#E69F00", "#009E73", "#CC79A7", VERMILLION, "#56B4E9")
INK = "#010203"  # stands for the page's text colour, which matplotlib has no name for
WIDTH = 5.0  # inches; 360 points, about the width of a phone, so that text keeps its size there
STYLE: Any = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a `$` in a name is a dollar
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.alpha": 0.15,
    "lines.linewidth": 1.3,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    "grid.color": INK,
}
styled = rc_context(STYLE)


def model_colours(results: list[Result]) -> dict[str, str]:
    """One colour per model, the same in every figure."""
    return {model: COLOURS[n % len(COLOURS)] for n, model in enumerate(sorted({r.model for r in results}))}


def _svg(figure: Figure, name: str) -> Markup:
    """The figure as an <svg> element; equal for equal content, its inner links unlike those of another name."""
    file = io.StringIO()
    with rc_context({"svg.hashsalt": name}):
        figure.savefig(
            file, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    svg = file.getvalue()
    svg = re.sub(r' id="[\w.]+_\d+"', "", svg[svg.index("<svg") :])  # numbered from 1 in each figure, linked by none
    return Markup(svg.replace(INK, "currentColor"))


@styled
def accuracy_bars(section: Section, colours: dict[str, str]) -> Markup:
    """Test accuracy by row, with its standard deviation and the published figure where there are any."""
    rows = section.rows[::-1]
    figure = Figure(figsize=(WIDTH, 0.45 + 0.42 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    for at, row in enumerate(rows):
        mean, std = row.mean(ACCURACY), row.std(ACCURACY)
        if mean is not None:
            axes.barh(at, 100 * mean, height=0.42, color=colours[row.first.model])
            if std is not None:
                axes.errorbar(100 * mean, at, xerr=100 * std, color=INK, capsize=3, linewidth=1)
        theirs = row.first.record["published"]
        if theirs:
            axes.plot(100 * theirs["accuracy"], at, "D", markersize=5, markerfacecolor="none", markeredgecolor=INK)
        axes.text(0, at + 0.28, row.label, va="bottom")
        axes.text(100, at + 0.28, "-" if mean is None else percent(mean), va="bottom", ha="right")
    axes.set(xlim=(0, 100), ylim=(-0.4, len(rows) - 0.1), yticks=[], xlabel="test accuracy %")
    axes.grid(axis="x")
    axes.spines["left"].set_visible(False)
    return _svg(figure, f"bars {section.title}")


@styled
def learning_curves(section: Section, colours: dict[str, str]) -> list[Markup]:
    """By row: train loss over about 100 points an epoch, and test accuracy after each, by step. Equal scales."""
    losses = [point["loss"] for row in section.rows for r in row.results for point in r.run.steps]
    finite = [value for value in losses if value is not None]
    highest = 1.05 * float(np.percentile(finite, 99.5)) if finite else 1.0
    accuracies = [e[ACCURACY] for row in section.rows for r in row.results for e in r.run.metrics]
    reached = [100 * value for value in accuracies if value is not None] or [0, 100]
    span = (max(0, min(reached) - 3), min(100, max(reached) + 3))
    return [_curves(row, colours[row.first.model], highest, span) for row in section.rows]


def _curves(row: Row, colour: str, highest: float, span: tuple[float, float]) -> Markup:
    figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    faint = 1.0 if len(row.results) == 1 else 0.6
    for result in row.results:
        _line(above, result.run.steps, "loss", 1, color=colour, alpha=faint, linewidth=1)
        _line(below, result.run.metrics, ACCURACY, 100, color=colour, alpha=faint, marker="o", markersize=4)
    seeds = f", {len(row.results)} seeds" if len(row.results) > 1 else ""
    above.set(title=row.label + seeds, ylabel="train loss", ylim=(0, highest))
    below.set(xlabel="step", ylabel="test accuracy %", ylim=span, xlim=(0, None))
    for axes in (above, below):
        axes.grid()
    figure.align_ylabels()
    return _svg(figure, f"curves {row.first.name}")


def _line(axes: Axes, points: list[dict[str, Any]], name: str, scale: float, **style: Any) -> None:
    values = [math.nan if p[name] is None else scale * p[name] for p in points]
    axes.plot([p["step"] for p in points], values, **style)


@styled
def confusion_matrices(section: Section) -> list[Markup]:
    """By row: rows are the true class, columns the predicted one; a cell's shade is its share of the true class."""
    return [_confusion(row, counts) for row in section.rows if (counts := row.confusion()) is not None]


def _confusion(row: Row, counts: np.ndarray) -> Markup:
    n = len(counts)
    names = row.first.record.get("classes") or [str(c) for c in range(n)]
    figure = Figure(figsize=(WIDTH, WIDTH), layout="constrained")
    axes = figure.add_subplot()
    for true, predicted in np.argwhere(counts):
        count = counts[true, predicted]
        # The square root lets a share of 1 % be seen; not full colour, so that the ink on it can be read.
        shade = 0.7 * math.sqrt(count / counts[true].sum())
        colour = BLUE if true == predicted else VERMILLION
        axes.add_patch(Rectangle((predicted - 0.48, true - 0.48), 0.96, 0.96, color=colour, alpha=shade, linewidth=0))
        axes.text(predicted, true, str(count), ha="center", va="center_baseline", fontsize=8)
    seeds = f", {len(row.results)} seeds added" if len(row.results) > 1 else ""
    axes.set(xlim=(-0.5, n - 0.5), ylim=(n - 0.5, -0.5), aspect="equal", title=row.label + seeds)
    axes.set(xlabel="predicted", ylabel="true", xticks=range(n), yticks=range(n), yticklabels=names)
    axes.set_xticklabels(names, rotation=90)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return _svg(figure, f"confusion {row.first.name}")
