"""Write the report as an HTML page and as markdown."""

from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from fashion_ddp.report import figures, sentences, tables
from fashion_ddp.report.album import Album
from fashion_ddp.report.rows import Comparison, Row, Section
from fashion_ddp.report.text import markdown_table, markdown_text

HERE = Path(__file__).parent
PICTURED = 12  # the number of rows, from the best, whose pictures are shown: fifty would make the page too large
READABLE_CLASSES = 20  # a confusion matrix of more classes cannot be read


def html_page(comparison: Comparison) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    common, differing = tables.environment_tables(comparison)
    return environment.get_template("report.html").render(
        title=sentences.title(comparison),
        headline=sentences.headline(comparison),
        style=Markup((HERE / "report.css").read_text()),
        script=Markup((HERE / "report.js").read_text()),
        sections=[_section(section, f"s{n}") for n, section in enumerate(comparison.sections, start=1)],
        unfinished=tables.unfinished_table(comparison),
        cost=tables.cost_table(comparison),
        cost_said=sentences.cost_sentences(comparison),
        findings=sentences.findings(comparison),
        method=sentences.method(comparison),
        common=common,
        differing=differing,
        best_sign=tables.BEST,
    )


def _section(section: Section, key: str) -> dict[str, Any]:
    """Return all that the template shows of a section; `key` is the prefix of its anchors."""
    album, readable = Album(section, key, PICTURED), len(section.first.classes) <= READABLE_CLASSES
    pictured = section.rows[:PICTURED]
    maps = [(row.label, *album.feature_maps(row.first)) for row in pictured]
    return {
        "key": key,
        "title": section.title,
        "order": {row.label: index % figures.COLOURS for index, row in enumerate(section.rows)},
        "synthetic": section.synthetic,
        "verdict": sentences.verdict(section),
        "main": tables.main_table(section),
        "caveats": sentences.caveats(section),
        "best": section.best,
        "pairs": tables.pairs_table(section),
        "published": tables.tutorials_table(section),
        "single": tables.single_runs(section),
        "settings": tables.settings_table(section),
        "bars": figures.accuracy_bars(section),
        "curves": figures.learning_curves(section),
        "costs": figures.cost_figures(section),
        "relu": sentences.RELU,
        "logits": [
            (r.name, figures.logits_figure(r) if readable else "", sentences.dead_logits_sentence(r))
            for row in section.rows
            for r in row.results
            if "positive_by_class" in r.record
        ],
        "confusion": [
            (row, counts, _shades(counts)) for row in section.rows if (counts := row.confusion()) is not None
        ],
        "readable": readable,
        "classes": section.first.classes,
        "by_class": tables.class_table(section),
        "by_class_of": f"the best {tables.BY_CLASS} rows" if len(section.rows) > tables.BY_CLASS else "",
        "confused": [(row, _confused_pairs(row, album)) for row in pictured],
        "grids": [(row, tiles) for row in pictured if (tiles := album.prediction_tiles(row))],
        "wrong": [(row, tiles) for row in pictured if (tiles := album.confidently_wrong_tiles(row))],
        "samples": album.sample_tiles(),
        "maps": [of_row for of_row in maps if of_row[1]],
        "layers": [(row, text) for row in section.rows if (text := _layers(row))],
        "left_out": len(section.rows) - len(pictured),
        "symbols": list(album.symbols.values()),  # last, because the calls above add to them
    }


def _shades(counts: np.ndarray) -> list[list[str]]:
    """Return how strongly each cell is coloured. The square root makes even 1 % of the true class visible."""
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    return [[f"{0.7 * value**0.5:.2f}" for value in line] for line in shares]


def _confused_pairs(row: Row, album: Album) -> list[dict[str, Any]]:
    names = row.first.classes
    return [
        {
            "true": names[t],
            "predicted": names[p],
            "images": count,
            "share": share,
            "tiles": album.confused_tiles(row, t, p),
        }
        for t, p, count, share in tables.most_confused(row)
    ]


def _layers(row: Row) -> str:
    """Return the model's layers, as printed at the run's start; "" where the run did not record them."""
    path = row.first.run.path / "model.txt"
    return path.read_text(errors="replace").rstrip() if path.exists() else ""


def markdown_page(comparison: Comparison) -> str:
    text, table = markdown_text, markdown_table
    parts = [f"# {text(sentences.title(comparison))}\n", text(sentences.headline(comparison)) + "\n"]
    for section in comparison.sections:
        parts += [f"## {text(section.title)}\n", " ".join(map(text, sentences.verdict(section))) + "\n"]
        parts.append(table(tables.main_table(section)))
        parts += [text(caveat) + "\n" for caveat in sentences.caveats(section)]
        for heading, shown in (
            ("Are the differences real?", tables.pairs_table(section)),
            ("Beside the tutorials' published figures", tables.tutorials_table(section)),
            ("Single runs", tables.single_runs(section)),
            ("What differs between the rows", tables.settings_table(section)),
            ("By class", tables.class_table(section)),
            ("Most confused classes", tables.confused_table(section)),
        ):
            parts += [f"### {heading}\n", table(shown)] if shown else []
    if unfinished := tables.unfinished_table(comparison):
        parts += ["## Not finished, not ranked\n", table(unfinished)]
    if cost := tables.cost_table(comparison):
        parts += ["## What it cost on the cluster\n", table(cost), text(sentences.cost_sentences(comparison)) + "\n"]
    notes = sentences.dead_logits(comparison) + sentences.findings(comparison) + sentences.method(comparison)
    parts += ["## Notes\n", "".join(f"- {text(note)}\n" for note in notes)]
    return "\n".join(parts)
