"""Tell what next_steps.py found: docs/next-steps.md, and its picture.

python benchmarks/next_steps_page.py > docs/next-steps.md        draws docs/pictures/next-steps.svg, too
"""

import json
import statistics
import textwrap
from pathlib import Path
from typing import Any

from next_steps import RESULTS
from pictures import framed
from speedrun import summarize

from fashion_ddp.report.pairs import LEVEL
from fashion_ddp.report.svg import LINE, Scale, line, text, tick_text
from fashion_ddp.report.text import Table, markdown_table, p_value_text, settings_text

PICTURE = Path(__file__).parent.parent / "docs" / "pictures" / "next-steps.svg"
# Pixels: room for the rows' names, across the scale, for their values; a row's height, and what is above the first.
NAMES, ACROSS, VALUES, ROW, TOP = 210.0, 300.0, 60.0, 1.6 * LINE, 24.0

PAGE = """\
# What the next steps bring

Both tutorials end with a list of next steps. This page takes them, on their own cnn with the lab notebook's settings:
{ways}. Made by [benchmarks/next_steps.py](../benchmarks/next_steps.py) from
[its results](../benchmarks/results/next_steps.json); `python benchmarks/next_steps.py` repeats it, in a night on two
cores.

Each figure is the mean over {n} seeds, after the last epoch. Settings are judged on 5,000 training images that were
held out, so that the runs train on 55,000; each run opens the test set once, at its end, and nothing is chosen by it.
The gain is on the test set, in points, with the 95 % interval of the [report](../README.md#the-report)'s paired
bootstrap over images and seeds. p is McNemar's exact test for the weakest pair of runs, adjusted by Holm for all rows
of a table: a difference is shown where it is below {level}. Time is the median step times the number of steps, of the
fastest of the seeds, as a multiple of the base's; two runs at a time, of one thread each, on {machine}.

## Each alone

{alone}

{hopes}
{together}{recipes}
## Not measured

Transfer learning: ImageNet's weights could not be had on a machine without a network. `--init-from
pretrained` does it ([models.md](models.md#weights-from-elsewhere)).{unmeasured}
"""

TOGETHER = """
## One on top of the other

A step stays where it raises the accuracy on the held-out images; the next one builds on it.

![{title}](pictures/next-steps.svg)

{table}
"""

RECIPES = """
## The recipes

Settings for a purpose, each a [YAML file](../fashion_ddp/config/recipes), chosen on the held-out images and then
trained on all 60,000 with seeds 0 to n - 1. Accuracies are of the last epoch, mean and standard deviation; with
views: with test-time augmentation. Time is the tutorials' clock, median and range: training, and the passes over the
test set. `python benchmarks/speedrun.py --model airbench --recipe fast` repeats the first.

{table}
"""


def percent(figure: list[float]) -> str:
    """Write a mean and a standard deviation, fractions, in percent."""
    return f"{100 * figure[0]:.2f} +- {100 * figure[1]:.2f}"


def table(rows: list[dict[str, Any]], kept: bool) -> str:
    """Write a part of the results as a table."""
    base, lines = rows[0], []
    for row in rows:
        words = settings_text({name: value for name, value in row["settings"].items() if value is not None})
        cells = [row["name"], words, percent(row["val"]), percent(row["test"]), "", ""]
        if "gain" in row:
            low, high = row["interval"]
            cells[4:] = [f"{row['gain']:+.2f} ({low:+.2f} to {high:+.2f})", p_value_text(row["p_holm"])]
        cells += [f"{row['train_s'] / base['train_s']:.2f}", f"{row['parameters']:,}"]
        cells += [f"{row['flops_per_image'] / 1e6:.2f}"]
        stays = "" if "kept" not in row else "yes" if row["kept"] else "no"
        lines.append(cells + [stays] * kept)
    titles = ["step", "settings", "held out %", "test %", "gain: points", "p", "time", "parameters", "MFLOPs"]
    numeric = [False, False, *[True] * 7, *[False] * kept]
    return markdown_table(Table(titles + ["stays"] * kept, numeric, lines)).rstrip()


def hopes(rows: list[dict[str, Any]]) -> str:
    """Say which steps do not hold what was hoped of them, when taken alone."""
    tested = [row for row in rows if "gain" in row]
    shown = [row["name"] for row in tested if row["gain"] > 0 and row["p_holm"] < LEVEL]
    worse = [row["name"] for row in tested if row["gain"] < 0 and row["p_holm"] < LEVEL]
    others = [row["name"] for row in tested if row["name"] not in shown + worse]
    said = [f"Better in each pair of runs: {', '.join(shown) or 'none'}."]
    said += [f"Worse in each pair of runs: {', '.join(worse) or 'none'}."]
    said += [f"Not shown to be either, in three epochs: {', '.join(others) or 'none'}."]
    return "\n".join(textwrap.fill(one, 119, initial_indent="- ", subsequent_indent="  ") for one in said)


def recipes(several: list[dict[str, Any]]) -> str:
    """Write what the recipes reached, as speedrun.py found it, as a table and a line for each on its threshold."""
    lines, said = [], []
    for found in sorted(several, key=lambda one: statistics.median(run["seconds"] for run in one["runs"])):
        runs, about = found["runs"], found["made"]["machine"]
        plain, viewed, seconds = ([run[name] for run in runs] for name in ("plain", "accuracy", "seconds"))
        cells = [percent([statistics.fmean(one), statistics.stdev(one)]) for one in (plain, viewed)]
        time = f"{statistics.median(seconds):.0f} ({min(seconds):.0f} to {max(seconds):.0f})"
        name = " ".join([found["recipe"], *found["flags"]])
        row = [name, found["model"], f"{runs[0]['parameters']:,}", str(runs[0]["epochs"]), runs[0]["precision"]]
        lines.append([*row, str(len(plain)), *cells, time, about["processor"]])
        said.append(f"- {name}: {summarize(runs, found['loop'], found['threshold'])}.")
    titles = ["recipe", "model", "parameters", "epochs", "precision", "n", "test %", "with views %", "time s", "on"]
    numeric = [False, False, True, True, False, *[True] * 4, False]
    return "\n".join([markdown_table(Table(titles, numeric, lines)), *said])


def picture(rows: list[dict[str, Any]], title: str) -> str:
    """Draw the test accuracy after each step that stays, from the base to the best."""
    stays = [row for row in rows if row.get("kept", True)]
    reached = [(100 * row["test"][0], 100 * row["test"][1]) for row in stays]
    low, high = min(mean - std for mean, std in reached), max(mean + std for mean, std in reached)
    x = Scale(low, high, NAMES, NAMES + ACROSS)
    bottom = TOP + ROW * len(stays)
    parts = []
    for value in x.ticks(6):
        parts += [line(x(value), TOP, x(value), bottom, "grid")]
        parts += [text(x(value), bottom + 15, tick_text(value), class_="tick", text_anchor="middle")]
    for place, (row, (mean, std)) in enumerate(zip(stays, reached, strict=True)):
        y = TOP + ROW * (place + 0.5)
        name = ("+ " if place else "") + row["name"]
        parts += [text(NAMES - 8, y + 4, name, class_="name", text_anchor="end")]
        parts += [
            line(x(mean - std), y, x(mean + std), y, "curve c0 w3"),
            line(x(mean), y - 5, x(mean), y + 5, "curve c0 w2"),
        ]
        parts += [text(x.end + 8, y + 4, f"{mean:.2f} %", class_="name")]
    parts.append(text(0, 8, "test accuracy %, mean and standard deviation over seeds", class_="title"))
    return framed(title, NAMES + ACROSS + VALUES, bottom + 24, parts)


def titled(rows: list[dict[str, Any]]) -> str:
    stays = [row for row in rows if row.get("kept", True)]
    return (
        f"Test accuracy of the tutorials' cnn as steps are added: from {100 * stays[0]['test'][0]:.2f} % to "
        f"{100 * stays[-1]['test'][0]:.2f} %"
    )


def page(found: dict[str, Any]) -> str:
    """Return the page, of the parts that are measured."""
    alone, about = found["alone"]["rows"], found["alone"]["made"]["machine"]
    together, reached, unmeasured = "", "", ""
    if "together" in found:
        steps = found["together"]["rows"]
        together = TOGETHER.format(title=titled(steps), table=table(steps, kept=True))
    else:
        unmeasured += "\n\nOne step on top of the other: `python benchmarks/next_steps.py --only together` does it."
    if files := sorted(RESULTS.parent.glob("recipe_*.json")):
        reached = RECIPES.format(table=recipes([json.loads(path.read_text()) for path in files]))
    else:
        unmeasured += "\n\nWhat the recipes reach: `python benchmarks/speedrun.py` measures it."
    return PAGE.format(
        ways="each alone, and then one on top of the other" if together else "each alone",
        n=alone[0]["n"],
        level=LEVEL,
        machine=f"{about['cores']} cores of an {about['processor']}, torch {about['torch']}",
        alone=table(alone, kept=False),
        hopes=hopes(alone),
        together=together,
        recipes=reached,
        unmeasured=unmeasured,
    )


if __name__ == "__main__":
    found = json.loads(RESULTS.read_text())
    if "together" in found:
        steps = found["together"]["rows"]
        PICTURE.write_text(picture(steps, titled(steps)))
    print(page(found), end="")
