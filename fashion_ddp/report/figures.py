"""Draw the report's figures. A row has the same colour in all figures of its section, by its index in the table.

Colours (report.css) are Okabe and Ito's (https://jfly.uni-koeln.de/color/), which colour-blind people can tell apart.
Every line and point has its name beside it, so that no reader depends on colour.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from fashion_ddp.report.results import ACCURACY, SECONDS, Result
from fashion_ddp.report.rows import Row, Section
from fashion_ddp.report.svg import (
    WIDTH,
    Scale,
    axes,
    drawing,
    element,
    line,
    polyline,
    shorten,
    spread_apart,
    text,
)
from fashion_ddp.report.text import percent

COLOURS = 6  # classes c0 to c5 of report.css
LEFT, LABELS = 34.0, 104.0  # pixels for the ticks' values, and for names at the ends of lines
NAMED = 10  # the number of points with a name, from the best: there is no room for fifty


def synthetic_mark(result: Result) -> str:
    return "SYNTHETIC data" if result.synthetic else ""


def row_name(row: Row) -> str:
    """Return a row's label without the mark, which the drawing shows itself."""
    return row.label.removeprefix("SYNTHETIC ")


def colour_class(index: int) -> str:
    return f"c{index % COLOURS}"


def accuracy_bars(section: Section) -> Markup:
    """Draw test accuracy by row, with its 95 % interval, and the published figure where there is one."""
    x = Scale(0, 100, 0, WIDTH)
    height, parts = 31.0, []
    bottom = height * len(section.rows) + 4
    for value in (0, 25, 50, 75, 100):
        anchor = {0: "start", 100: "end"}.get(value, "middle")
        parts += [line(x(value), 0, x(value), bottom, "grid")]
        parts += [text(x(value), bottom + 12, f"{value} %" if value == 100 else str(value), text_anchor=anchor)]
    for index, row in enumerate(section.rows):
        y, mean, interval = index * height, row.mean(ACCURACY), row.interval()
        figure = "-" if mean is None else percent(mean)
        parts += [text(1, y + 12, shorten(row_name(row), WIDTH - 60), class_="name")]
        parts += [text(WIDTH, y + 12, figure, class_="name", text_anchor="end")]
        if mean is not None:
            parts.append(
                element("rect", x=0.0, y=y + 16, width=x(100 * mean), height=11.0, class_=f"bar {colour_class(index)}")
            )
        if interval:
            low, high = x(100 * interval.low), x(100 * interval.high)
            parts += [line(low, y + 21.5, high, y + 21.5, "whisker")]
            parts += [line(end, y + 17.5, end, y + 25.5, "whisker") for end in (low, high)]
        if theirs := row.first.record["published"]:
            at = x(100 * theirs["accuracy"])
            diamond = f"M{at:.1f} {y + 16:.1f}l5.5 5.5l-5.5 5.5l-5.5 -5.5z"
            parts.append(element("path", d=diamond, class_="published"))
    return drawing(bottom + 16, f"Test accuracy by row, {section.title}", parts, synthetic_mark(section.first))


# --- Learning curves --------------------------------------------------------------------------------------------


def learning_curves(section: Section) -> list[Markup]:
    """Draw train loss at about 100 points per epoch, and test accuracy after each epoch, by step; where all runs saw
    the test set only once, at their end, validation accuracy.

    A figure has six rows, and all figures the same scales. Several seeds are shown as their mean and their range.
    """
    losses = [_curve_over_seeds(row, "steps", "loss", 1) for row in section.rows]
    results = [result for row in section.rows for result in row.results]
    by_val = all(r.test_evaluations == 1 and all("val/accuracy" in epoch for epoch in r.run.metrics) for r in results)
    figure, title_below = ("val/accuracy", "validation accuracy %") if by_val else (ACCURACY, "test accuracy %")
    accuracies = [_curve_over_seeds(row, "metrics", figure, 100) for row in section.rows]
    finite = [v for line_ in losses for _, v, *_ in line_ if v is not None]
    reached = [v for line_ in accuracies for _, v, *_ in line_ if v is not None] or [0.0, 100.0]
    last = max((step for line_ in losses + accuracies for step, *_ in line_), default=1)
    highest = 1.05 * float(np.percentile(finite, 99.5)) if finite else 1.0
    x = Scale(0, last, LEFT, WIDTH - LABELS)
    above = Scale(0, highest, 210, 20)
    below = Scale(max(0.0, min(reached) - 3), min(100.0, max(reached) + 3), 210, 20)
    figures = []
    for start in range(0, len(section.rows), COLOURS):
        chosen = range(start, min(start + COLOURS, len(section.rows)))
        names = ", ".join(row_name(section.rows[index]) for index in chosen)
        for title, y, every in (("train loss", above, losses), (title_below, below, accuracies)):
            curves = [(index, section.rows[index], every[index]) for index in chosen]
            parts = axes(x, y, "step", title) + _draw_curves(x, y, curves, dots=y is below)
            figures.append(drawing(244, f"{title} by step: {names}", parts, synthetic_mark(section.first)))
    return figures


def _curve_over_seeds(row: Row, file: str, figure: str, scale: float) -> list[tuple[int, float | None, float, float]]:
    """Return per step: the step, the mean over the row's seeds, the lowest and the highest value.

    The mean is None where a seed has no finite value.
    """
    by_step: dict[int, list[float | None]] = {}
    for result in row.results:
        for point in getattr(result.run, file):
            by_step.setdefault(point["step"], []).append(point.get(figure))
    curve: list[tuple[int, float | None, float, float]] = []
    for step, values in sorted(by_step.items()):
        finite = [scale * v for v in values if v is not None]
        complete = len(finite) == len(values) == len(row.results)
        mean_low_high = (sum(finite) / len(finite), min(finite), max(finite)) if complete else (None, 0.0, 0.0)
        curve.append((step, *mean_low_high))
    return curve


def _draw_curves(x: Scale, y: Scale, rows: list[tuple[int, Row, list[Any]]], dots: bool) -> list[Markup]:
    """Draw curves with their ranges, and their names at the right end. Values beyond the scale are put at its edge."""

    def at(step: float, value: float) -> tuple[float, float]:
        return x(step), y(min(max(value, y.low), y.high))

    parts, ends, names = [], [], []
    for index, row, curve in rows:
        whole = [point for point in curve if point[1] is not None]
        if len(row.results) > 1 and len(whole) > 1:
            edge = [at(p[0], p[3]) for p in whole] + [at(p[0], p[2]) for p in reversed(whole)]
            parts.append(polyline(edge, f"range {colour_class(index)}"))
        parts.append(
            polyline([None if p[1] is None else at(p[0], p[1]) for p in curve], f"curve {colour_class(index)}")
        )
        parts += [_dot(*at(p[0], p[1]), 2.2, index) for p in whole] if dots else []
        if whole:
            last = whole[-10:] if not dots else whole[-1:]  # the loss is noisy: put its name at the mean of ten points
            ends.append(at(0, sum(p[1] for p in last) / len(last))[1])
            names.append((index, row))
    for (index, row), end, middle in zip(names, ends, spread_apart(ends, y.start), strict=True):
        parts.append(polyline([(x.end + 2, end), (x.end + 9, middle)], f"leader {colour_class(index)}"))
        parts.append(text(x.end + 12, middle + 4, shorten(row_name(row), LABELS - 12), class_="name"))
    return parts


def _dot(x: float, y: float, radius: float, index: int) -> Markup:
    return element("circle", cx=float(x), cy=float(y), r=radius, class_=f"dot {colour_class(index)}")


# --- Accuracy against its cost ----------------------------------------------------------------------------------


def accuracy_against(section: Section, figure: str, title: str) -> Markup | None:
    """Draw test accuracy against a figure, a point per row, with names for the first rows.

    The axis is logarithmic if the values span more than a factor of ten. None where fewer than two rows have both.
    """
    points = [
        (index, row, value, 100 * mean)
        for index, row in enumerate(section.rows)
        if (value := row.mean(figure)) and (mean := row.mean(ACCURACY)) is not None
    ]
    if len(points) < 2:
        return None
    values, reached = [p[2] for p in points], [p[3] for p in points]
    low, high = min(values), max(values)
    log = high > 10 * low
    edges = (low / 1.4, high * 1.4) if log else (0.0, high * 1.1)
    x = Scale(*edges, LEFT, WIDTH - 8, log)
    y = Scale(max(0.0, min(reached) - 4), min(100.0, max(reached) + 4), 210, 20)
    parts = axes(x, y, title, "test accuracy %")
    parts += [_dot(x(value), y(mean), 4.5, index) for index, _, value, mean in points]
    for on_right in (True, False):  # names are on the side that has room
        side = [p for p in points[:NAMED] if (x(p[2]) < WIDTH * 0.62) is on_right]
        heights = spread_apart([y(p[3]) for p in side], y.start - 4)
        for (index, row, value, mean), height in zip(side, heights, strict=True):
            at, sign = x(value), 1 if on_right else -1
            if abs(height - y(mean)) > 3:
                parts += [polyline([(at, y(mean)), (at + 7 * sign, height)], f"leader {colour_class(index)}")]
            room = WIDTH - at - 10 if on_right else at - LEFT - 10
            anchor = "start" if on_right else "end"
            parts += [text(at + 9 * sign, height + 4, shorten(row_name(row), room), class_="name", text_anchor=anchor)]
    return drawing(244, f"Test accuracy against {title}", parts, synthetic_mark(section.first))


def cost_figures(section: Section) -> list[Markup]:
    shared = any(row.shared for row in section.rows)
    time = f"training time, s{' (shared by runs at once)' if shared else ''}"
    found = [accuracy_against(section, SECONDS, time), accuracy_against(section, "parameters", "parameters")]
    return [figure for figure in found if figure is not None]


# --- Dead logits ------------------------------------------------------------------------------------------------


def logits_figure(result: Result) -> Markup:
    """Draw the share of test images on which each logit is positive; a dead logit is positive on none."""
    shares: Sequence[float] = result.record["positive_by_class"]
    unused = result.record["never_predicted"]
    names, left, height = result.classes, 96.0, 18.0
    x, parts = Scale(0, 1, left, WIDTH - 48), []
    for index, (label, share) in enumerate(zip(names, shares, strict=True)):
        y, is_dead = index * height, share == 0
        parts += [text(left - 6, y + 12, shorten(label, left - 6), text_anchor="end", class_="name")]
        if is_dead:
            parts += [text(left + 1, y + 12, "dead: 0 on every image", class_="dead")]
        else:
            parts += [element("rect", x=left, y=y + 3, width=x(share) - left, height=11.0, class_="bar c0")]
            parts += [text(x(share) + 5, y + 12, f"{percent(share)} %")]
        if label in unused and not is_dead:
            parts += [text(x(share) + 56, y + 12, "never predicted", class_="dead")]
    return drawing(
        height * len(names) + 4,
        f"Share of test images with a positive logit, {result.name}",
        parts,
        synthetic_mark(result),
    )
