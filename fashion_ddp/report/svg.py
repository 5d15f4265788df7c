"""Draw small figures as inline SVG. They use the page's font and colours, so they work on light and dark pages.

They are about as wide as a phone, so that text keeps its size there; the page scales them. Positions are in pixels of
that width. markupsafe escapes the text.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH = 360.0
LETTER = 6.8  # pixels that a letter takes at the drawings' text size, about
LINE = 13.0  # height of a line of text


def element(tag: str, *inside: str, **attributes: object) -> Markup:
    """Return an SVG element. `class_` becomes class, `font_size` font-size; floats are rounded to tenths of a pixel."""
    given = {name.rstrip("_").replace("_", "-"): value for name, value in attributes.items()}
    written = "".join(
        f' {name}="{number(value) if isinstance(value, float) else escape(str(value))}"'
        for name, value in given.items()
    )
    return Markup(f"<{tag}{written}>{''.join(escape(part) for part in inside)}</{tag}>")


def number(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def drawing(height: float, label: str, parts: Iterable[str], mark: str = "") -> Markup:
    """Return the whole <svg>. Screen readers read `label`; `mark` is a warning below the drawing."""
    below = [text(WIDTH, height + 10, mark, class_="mark", text_anchor="end")] if mark else []
    box = f"0 0 {number(WIDTH)} {number(height + 14 * len(below))}"
    return element("svg", *parts, *below, viewBox=box, role="img", aria_label=label, class_="plot")


def text(x: float, y: float, content: str, **attributes: object) -> Markup:
    return element("text", content, x=float(x), y=float(y), **attributes)


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    return element("line", x1=float(x1), y1=float(y1), x2=float(x2), y2=float(y2), class_=class_)


def shorten(label: str, room: float) -> str:
    """Shorten a label to fit into `room` pixels."""
    letters = max(2, int(room / LETTER))
    return label if len(label) <= letters else label[: letters - 1] + "\N{HORIZONTAL ELLIPSIS}"


def spread_apart(heights: Sequence[float], lowest: float, distance: float = LINE) -> list[float]:
    """Move the heights of labels so that none covers another, in the same order and above `lowest`."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    placed = [heights[i] for i in order]
    for i in range(1, len(placed)):
        placed[i] = max(placed[i], placed[i - 1] + distance)
    limit = lowest
    for i in reversed(range(len(placed))):
        placed[i] = min(placed[i], limit)
        limit = placed[i] - distance
    moved = [0.0] * len(heights)
    for height, i in zip(placed, order, strict=True):
        moved[i] = height
    return moved


@dataclass(frozen=True)
class Scale:
    """Map values from `low` to `high` to pixels from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (value - low) / ((high - low) or 1.0) * (self.end - self.start)

    def ticks(self, about: int = 4) -> list[float]:
        """Return about `about` round values; on a logarithmic scale powers of ten, or also 2, 3 or 5 times them."""
        if self.log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for steps in ((1,), (1, 3), (1, 2, 5)):
                found = [s * 10.0**p for p in powers for s in steps if self.low <= s * 10.0**p <= self.high]
                if len(found) > 2:
                    break
            return found
        span = (self.high - self.low) or 1.0
        power = 10.0 ** math.floor(math.log10(span / about))
        step = next(s * power for s in (1, 2, 5, 10) if span / (s * power) <= about + 1)
        first = math.ceil(self.low / step - 1e-9)
        return [k * step for k in range(first, math.floor(self.high / step + 1e-9) + 1)]


def tick_text(value: float) -> str:
    """Return a tick's value as text: 0.5, 40, 1,000, 20k, 3M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == 'k' else size):g}{letter}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{round(value, 6):g}"


def axes(x: Scale, y: Scale, x_title: str, y_title: str) -> list[Markup]:
    """Draw grid, ticks and titles. The y title is above the axis, so that it need not be rotated."""
    parts = [text(0, y.end - 9, y_title, class_="title")]
    for value in y.ticks():
        parts += [line(x.start, y(value), x.end, y(value), "grid")]
        parts += [text(x.start - 5, y(value) + 4, tick_text(value), class_="tick", text_anchor="end")]
    for value in x.ticks():
        parts += [line(x(value), y.start, x(value), y.start + 4, "axis")]
        parts += [text(x(value), y.start + 15, tick_text(value), class_="tick", text_anchor="middle")]
    parts.append(line(x.start, y.start, x.end, y.start, "axis"))
    parts.append(text((x.start + x.end) / 2, y.start + 29, x_title, class_="tick", text_anchor="middle"))
    return parts


def polyline(points: Iterable[tuple[float, float] | None], class_: str) -> Markup:
    """Draw a line through points in pixels; None interrupts it."""
    path, pen = [], "M"
    for point in points:
        if point is None:
            pen = "M"
            continue
        path.append(f"{pen}{number(point[0])} {number(point[1])}")
        pen = "L"
    return element("path", d="".join(path), class_=class_)
