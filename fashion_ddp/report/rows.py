"""Which runs stand in one row, and which rows in one table.

A table holds finished runs of the same data only. A row holds runs that differ in nothing but the seed: it shows
their mean and sample standard deviation.
"""

import json
import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fashion_ddp.report.results import ACCURACY, IMAGES_PER_S, LOSS, SECONDS, Result


@dataclass(frozen=True)
class Row:
    """`label` tells the row from the others of its table."""

    label: str
    results: list[Result]

    @property
    def first(self) -> Result:
        return self.results[0]

    def mean(self, name: str) -> float | None:
        """None where any of the runs has no such figure, or one that is not finite."""
        values = [r.record[name] for r in self.results if r.record.get(name) is not None]
        return statistics.fmean(values) if len(values) == len(self.results) else None

    def std(self, name: str) -> float | None:
        """Sample standard deviation (n - 1); None for a single run."""
        several = len(self.results) > 1 and self.mean(name) is not None
        return statistics.stdev(r.record[name] for r in self.results) if several else None

    def confusion(self) -> np.ndarray | None:
        """Counts [true, predicted], added over the runs that have predictions; None without any."""
        counts = [np.array(r.record["confusion"]) for r in self.results if "confusion" in r.record]
        return sum(counts[1:], counts[0]) if counts else None


@dataclass(frozen=True)
class Section:
    """The finished runs of one dataset, best row first."""

    title: str
    synthetic: bool
    rows: list[Row]


@dataclass(frozen=True)
class Comparison:
    sections: list[Section]
    unfinished: list[Result]

    @property
    def finished(self) -> list[Result]:
        return [r for section in self.sections for row in section.rows for r in row.results]

    @property
    def results(self) -> list[Result]:
        return self.finished + self.unfinished

    def as_json(self) -> dict[str, Any]:
        """The content of report.json."""

        def each(figure: Callable[[str], float | None]) -> dict[str, float | None]:
            return {name: figure(name) for name in (ACCURACY, LOSS, SECONDS, IMAGES_PER_S)}

        rows = [
            {"dataset": section.title, "label": row.label, "runs": [r.name for r in row.results]}
            | {"n": len(row.results), "mean": each(row.mean), "std": each(row.std)}
            for section in self.sections
            for row in section.rows
        ]
        return {"runs": [r.record for r in self.results], "rows": rows}


def compare(results: list[Result]) -> Comparison:
    """Rank the finished runs of each dataset."""
    by_data: dict[str, list[Result]] = {}
    for result in results:
        if result.finished:
            key = json.dumps([result.record["dataset"], result.data_md5], sort_keys=True)
            by_data.setdefault(key, []).append(result)
    names = Counter(group[0].record["dataset"] for group in by_data.values())
    sections = [_section(group, several=names[group[0].record["dataset"]] > 1) for group in by_data.values()]
    return Comparison(sorted(sections, key=lambda s: (s.synthetic, s.title)), [r for r in results if not r.finished])


def _section(results: list[Result], several: bool) -> Section:
    """One table; `several` datasets have its name, so that the title must tell which this is."""
    first = results[0]
    files = ", ".join(f"{file} {md5[:8]}" for file, md5 in sorted(first.data_md5.items())) or "files not recorded"
    title = ("SYNTHETIC data" if first.synthetic else first.record["dataset"]) + (f" ({files})" if several else "")

    def rank(row: Row) -> tuple[float, str]:
        return -(row.mean(ACCURACY) or 0.0), row.label

    return Section(title, first.synthetic, sorted(_rows(results), key=rank))


def _rows(results: list[Result]) -> list[Row]:
    groups: dict[tuple[str, int], list[Result]] = {}
    seen: Counter[tuple[str, int]] = Counter()
    for result in sorted(results, key=lambda r: r.record["seed"]):
        # The same seed once more says nothing about the spread over seeds: it gets a row of its own.
        seed = result.experiment, result.record["seed"]
        groups.setdefault((result.experiment, seen[seed]), []).append(result)
        seen[seed] += 1
    firsts = [group[0] for group in groups.values()]
    several_recipes = len({r.recipe for r in firsts}) > 1
    several_places = len({r.place for r in firsts}) > 1

    def label(result: Result) -> str:
        recipe = result.recipe if several_recipes else ""
        place = f"on {result.place}" if several_places else ""
        mark = "SYNTHETIC" if result.synthetic else ""
        return " ".join(part for part in (mark, result.model, recipe, result.changed, place) if part)

    alike = Counter(map(label, firsts))
    return [Row(label(g[0]) + (f" ({g[0].name})" if alike[label(g[0])] > 1 else ""), g) for g in groups.values()]
