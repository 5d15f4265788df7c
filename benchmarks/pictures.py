"""The pictures of the pages, made again from real runs on the real data.

    python benchmarks/pictures.py                   all of them: ten minutes on two cores; `report` needs Chromium
    python benchmarks/pictures.py --only ranks      or interrupted, or report

`ranks.svg` and `interrupted.svg` are drawn by the report's own code. The title in each is its alt text where a page
shows it, so that a page says of a picture what its runs said. `report` photographs the report of four models on three
seeds.
"""

import argparse
import base64
import io
import json
import re
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from PIL import Image

from fashion_ddp.distributed import signals
from fashion_ddp.report.svg import LINE, WIDTH, Scale, axes, drawing, element, line, polyline, text
from launch import local  # noqa: TID251 - trains as `make compare` does
from launch.processes import LocalRanks  # noqa: TID251

CHECKOUT = Path(__file__).parent.parent
STYLE = CHECKOUT / "fashion_ddp" / "report" / "report.css"
LEFT, NAMES, BOTTOM, TOP = 34.0, 98.0, 210.0, 20.0  # pixels of a panel
GAP, MARGIN = 24.0, 16.0
OWN_STYLE = """\
.plot { font-family: system-ui, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", Arial, sans-serif }
.ground { fill: var(--page) }
.event { stroke: var(--mark); stroke-width: 1.2; stroke-dasharray: 3 3 }
.w0 { stroke-width: 6.4 } .w1 { stroke-width: 4.4 } .w2 { stroke-width: 2.6 } .w3 { stroke-width: 1 }
"""
EPOCH, REPEATED = 469, 60  # steps: of an epoch; of those that the kill costs, at least
Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Curve:
    name: str
    points: Points
    look: str  # classes: its colour, its width


# --- Drawing ----------------------------------------------------------------------------------------------------


def panel(x: Scale, y: Scale, title: str, curves: list[Curve], more: Iterable[Markup] = ()) -> Markup:
    """Curves over each other, and which is which at the right: names at their ends would all stand at one place. What
    is beyond the scale is drawn at its edge."""
    parts = axes(x, y, "step", title)
    for place, curve in enumerate(curves):
        inside = [(at, value) for at, value in curve.points if x.low <= at <= x.high]
        parts.append(polyline([(x(at), y(min(value, y.high))) for at, value in inside], f"curve {curve.look}"))
        middle = y.end + 8 + 1.3 * LINE * place
        parts.append(polyline([(x.end + 8, middle), (x.end + 22, middle)], f"curve {curve.look}"))
        parts.append(text(x.end + 27, middle + 4, curve.name, class_="name"))
    return drawing(BOTTOM + 34, title, [*parts, *more])


def picture(title: str, said: list[str], panels: list[Markup]) -> str:
    """A whole SVG file: panels side by side, and lines of text below them, on a ground of its own."""
    height = BOTTOM + 34
    placed = [
        element("svg", panel, x=place * (WIDTH + GAP), y=0.0, width=WIDTH, height=height)
        for place, panel in enumerate(panels)
    ]
    lines = [text(0, height + 1.5 * LINE * (place + 1), words) for place, words in enumerate(said)]
    return framed(title, len(panels) * (WIDTH + GAP) - GAP, height + 1.5 * LINE * (len(said) + 0.5), [*placed, *lines])


def framed(title: str, width: float, height: float, parts: Iterable[Markup]) -> str:
    """A whole SVG file of parts that take this room, on a ground of its own with a margin."""
    whole = width + 2 * MARGIN, height + 2 * MARGIN
    ground = element("rect", x=-MARGIN, y=-MARGIN, width=whole[0], height=whole[1], class_="ground")
    inside = [element("title", title), element("style", style()), ground, *parts]
    box = " ".join(f"{value:.0f}" for value in (-MARGIN, -MARGIN, *whole))
    return element("svg", *inside, xmlns="http://www.w3.org/2000/svg", viewBox=box, role="img", class_="plot") + "\n"


def style() -> Markup:
    """Of the report's style what these drawings use, so that they look as it does in light and in dark."""
    rules = STYLE.read_text()
    colours = rules[: rules.index("* {")]
    used = re.findall(r"^\.(?:plot|grid|axis|curve)\b[^}]*\}\n", rules, flags=re.MULTILINE)
    return Markup(colours + "".join(used) + OWN_STYLE)


def scale_of(curve: Points) -> Scale:
    """Of a loss: from 0, without its first moments, beside which nothing else could be seen."""
    return Scale(0, 1.05 * float(np.percentile([value for _, value in curve], 99)), BOTTOM, TOP)


def read(run: Path) -> list[dict[str, Any]]:
    return [json.loads(row) for row in (run / "steps.jsonl").read_text().splitlines()]


def loss(run: Path) -> Points:
    return [(row["step"], row["loss"]) for row in read(run)]


def on_cpu(folder: Path) -> tuple[str, ...]:
    return ("--device", "cpu", "--threads", "1", "--tracker", "none", "--run-dir", str(folder))


# --- 1, 2, 3 and 4 ranks ----------------------------------------------------------------------------------------


def ranks(runs: Path) -> str:
    """`linear` on 1 to 4 ranks: the curves lie on each other; and how far they lie from the first."""
    folders = {count: runs / f"{count}-ranks" for count in (1, 2, 3, 4)}
    for count, folder in folders.items():
        assert LocalRanks(("--model", "linear", *on_cpu(folder)), count).wait() == 0
    return draw_ranks([loss(folder) for folder in folders.values()])


def draw_ranks(curves: list[Points]) -> str:
    names = ["1 rank", *(f"{count} ranks" for count in range(2, len(curves) + 1))]
    off = [[(at, abs(value - one)) for (at, value), (_, one) in zip(curve, curves[0], strict=True)] for curve in curves]
    largest = max(value for points in off for _, value in points)
    found = f"{largest:.1e}".replace("e-0", "e-")
    x = Scale(0, curves[0][-1][0], LEFT, WIDTH - NAMES)
    lying = [Curve(name, curve, f"c{k} w{k}") for k, (name, curve) in enumerate(zip(names, curves, strict=True))]
    apart = [Curve(names[k], [(at, 1e9 * value) for at, value in off[k]], f"c{k} w3") for k in range(1, len(curves))]
    panels = [
        panel(x, scale_of(curves[0]), "train loss", lying),
        panel(x, Scale(0, 1.05e9 * largest, BOTTOM, TOP), "difference from 1 rank, in billionths", apart),
    ]
    title = (
        "Training loss of linear on 1, 2, 3 and 4 ranks, by step: four curves that lie on each other, and their "
        f"differences from that of 1 rank, of which the largest is {found}"
    )
    said = [
        "linear, recipe blog, the same command on 1, 2, 3 and 4 CPU ranks of one thread.",
        f"Largest difference from 1 rank at any of {len(curves[0])} points in 3 epochs: {found}.",
    ]
    return picture(title, said, panels)


# --- Killed, and continued --------------------------------------------------------------------------------------


def interrupted(runs: Path) -> str:
    """`cnn` on two ranks, of which one is killed in the second epoch; the same command continues."""
    whole, broken = runs / "undisturbed", runs / "killed"
    assert LocalRanks(("--model", "cnn", *on_cpu(whole)), 2).wait() == 0
    words = ("--model", "cnn", *on_cpu(broken), "--checkpoint-every", "8")
    threading.Thread(target=kill_a_rank, args=(broken,), daemon=True).start()
    assert LocalRanks(words, 2).wait() == 128 + signal.SIGKILL
    until, saved = loss(broken), newest_checkpoint(broken)
    assert LocalRanks(words, 2).wait() == 0
    return draw_interrupted(loss(whole), until, loss(broken), saved, what_it_found(whole) == what_it_found(broken))


def kill_a_rank(run: Path) -> None:
    """kill -9 in the second epoch, when the newest checkpoint is REPEATED steps old."""
    while (saved := newest_checkpoint(run)) < EPOCH or read(run)[-1]["step"] < saved + REPEATED:
        time.sleep(0.02)
    signals.children[1].kill()


def newest_checkpoint(run: Path) -> int:
    """Its step; 0 where there is none."""
    names = [path.stem for path in (run / "checkpoints").glob("step-*.pt")]
    return int(max(names).removeprefix("step-")) if names else 0


def what_it_found(run: Path) -> tuple[Any, ...]:
    """All that a run learned: its losses by step, its figures by epoch but for the times, its weights' bytes."""
    figures = [
        {name: value for name, value in json.loads(row).items() if not name.startswith(("time/", "throughput/"))}
        for row in (run / "metrics.jsonl").read_text().splitlines()
    ]
    return read(run), figures, (run / "model.safetensors").read_bytes()


def draw_interrupted(whole: Points, until: Points, after: Points, saved: int, equal: bool) -> str:
    killed = int(until[-1][0])
    curves = [
        Curve("undisturbed", whole, "c5 w0"),
        Curve("killed", until, "c0 w2"),
        Curve("continued", [point for point in after if point[0] > saved], "c4 w3"),
    ]
    near = [point for point in whole if saved - 100 <= point[0] <= killed + 100]
    panels = []
    for shown, about in ((whole, "train loss"), (near, "the same, about the kill")):
        lowest, highest = min(value for _, value in near), max(value for _, value in near)
        y = scale_of(whole) if shown is whole else Scale(0.95 * lowest, 1.14 * highest, BOTTOM, TOP)
        x = Scale(0 if shown is whole else shown[0][0], shown[-1][0], LEFT, WIDTH - NAMES)
        events = [line(x(killed), y.start, x(killed), y.end, "event"), text(x(killed) + 4, y.end + 9, "kill -9")]
        if shown is near:
            events += [line(x(saved), y.start, x(saved), y.end, "event")]
            events += [text(x(saved) - 4, y.end + 9, "checkpoint", text_anchor="end")]
        panels.append(panel(x, y, about, curves, events))
    found = "equal to the bit" if equal else "NOT equal"
    title = (
        f"Training loss of cnn on 2 ranks, by step: one rank is killed after step {killed}, the same command goes on "
        f"from the checkpoint of step {saved}, and its curve lies on that of an undisturbed run; both are {found}"
    )
    said = [
        f"cnn, recipe blog, 2 CPU ranks. kill -9 after step {killed}; the same command goes on after step {saved}.",
        f"Beside an undisturbed run: {len(after)} points of the loss, 3 epochs' figures and all weights are {found}.",
    ]
    return picture(title, said, panels)


# --- The report -------------------------------------------------------------------------------------------------

# By picture: how wide the page is, and what its top and its bottom edge are.
PHOTOGRAPHS = {
    "report": (1280, "body", ""),
    "curves": (1180, "[id$=-curves]", "[id$=-curves] ~ h3"),
    "dead-logits": (1180, "[id$=-dead]", "[id$=-dead] ~ h3"),
}


def report(runs: Path, out: Path) -> None:
    """Of four models on three seeds: the report's top, the learning curves, the dead logits."""
    sys.path.append(str(CHECKOUT / "tests"))
    from browser import Browser

    words = ["--seeds", "42", "0", "1", "--device", "cpu", "--tracker", "none", "--runs-dir", str(runs / "runs")]
    assert local.main([*words, "--out", str(runs / "report")]) == 0
    with Browser(runs / "browser") as browser:
        for name, (width, first, beyond) in PHOTOGRAPHS.items():
            browser.open(runs / "report" / "report.html", width)
            top, end = (
                browser.ask(f"document.querySelector('{at}').getBoundingClientRect().top") if at else 1030.0
                for at in (first, beyond)
            )
            clip = {"x": 0, "y": max(top - 14, 0), "width": width, "height": end - 42 - top, "scale": 1}
            shot = browser("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
            Image.open(io.BytesIO(base64.b64decode(shot["data"]))).quantize(64).save(out / f"{name}.png", optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["ranks", "interrupted", "report"])
    parser.add_argument("--out", type=Path, default=CHECKOUT / "docs" / "pictures")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        runs = Path(scratch)
        for draw in (ranks, interrupted):
            if args.only in (None, draw.__name__):
                (args.out / f"{draw.__name__}.svg").write_text(draw(runs))
        if args.only in (None, "report"):
            report(runs, args.out)


if __name__ == "__main__":
    main()
