"""Which runs stand in one row, and which rows in one table.

A table holds finished runs of the same data on the same kind of device only. A row holds runs that differ in nothing
but the seed: it shows their mean and sample standard deviation.
"""

import functools
import json
import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fashion_ddp.report.pairs import Pair, compare_pairs
from fashion_ddp.report.results import ACCURACY, CALIBRATION, IMAGES_PER_S, LOSS, MACRO_F1, MEMORY, SECONDS, Result
from fashion_ddp.report.statistics import Interval, t_interval, wilson
from fashion_ddp.report.text import assignments, in_common

FIGURES = (ACCURACY, LOSS, MACRO_F1, CALIBRATION, SECONDS, IMAGES_PER_S, MEMORY)


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

    def interval(self) -> Interval | None:
        """Of the accuracy, 95 %: for one seed Wilson's, from three on Student's t over them; None for two seeds, or
        without predictions."""
        if self.mean(ACCURACY) is None:
            return None
        if len(self.results) > 2:
            low, high = t_interval([r.record[ACCURACY] for r in self.results])
            return Interval(max(0.0, low), min(1.0, high))
        if len(self.results) == 1 and (answers := self.first.answers):
            return wilson(int(answers.correct.sum()), len(answers.labels))
        return None

    @property
    def at_once(self) -> list[int]:
        """How many runs were trained at once when its own were: [1] where each had the machine to itself."""
        return sorted({r.at_once for r in self.results})

    @property
    def shared(self) -> bool:
        """Whether its times are no measure of speed."""
        return self.at_once != [1]

    def confusion(self) -> np.ndarray | None:
        """Counts [true, predicted], added over the runs that have predictions; None without any."""
        counts = [np.array(r.record["confusion"]) for r in self.results if "confusion" in r.record]
        return sum(counts[1:], counts[0]) if counts else None

    def f1_by_class(self) -> list[float] | None:
        """The mean over the runs; None without predictions."""
        every = [r.record["f1_by_class"] for r in self.results if "f1_by_class" in r.record]
        return np.mean(every, axis=0).tolist() if every else None

    def as_json(self) -> dict[str, Any]:
        def each(figure: Callable[[str], float | None]) -> dict[str, float | None]:
            return {name: figure(name) for name in FIGURES}

        of_row: dict[str, Any] = {"label": self.label, "runs": [r.name for r in self.results], "n": len(self.results)}
        of_row |= {"mean": each(self.mean), "std": each(self.std), "interval": self.interval()}
        of_row |= {"side_by_side": max(self.at_once)}
        return of_row | {"f1_by_class": self.f1_by_class()}


@dataclass(frozen=True)
class Section:
    """The finished runs of one dataset on one kind of device, best row first."""

    title: str
    rows: list[Row]

    @property
    def first(self) -> Result:
        return self.rows[0].first

    @property
    def synthetic(self) -> bool:
        return self.first.synthetic

    @property
    def ranked(self) -> list[Row]:
        """The rows that have an accuracy: all but those whose figures are not finite, which come last."""
        return [row for row in self.rows if row.mean(ACCURACY) is not None]

    @functools.cached_property
    def pairs(self) -> dict[tuple[int, int], Pair]:
        """By the places of two rows, the better first; empty where their runs cannot be paired image by image."""
        return compare_pairs([row.results for row in self.ranked])

    @property
    def best(self) -> Row | None:
        """The first row, if it is significantly better than every other."""
        others = [(0, other) for other in range(1, len(self.ranked))]
        shown = [pair in self.pairs and self.pairs[pair].significant for pair in others]
        return self.rows[0] if shown and all(shown) else None


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
        runs, rows, pairs = [r.record for r in self.results], [], []
        for section in self.sections:
            where = {"dataset": section.title}
            rows += [where | row.as_json() | {"best": row is section.best} for row in section.rows]
            labels = [row.label for row in section.rows]
            pairs += [
                where | {"first": labels[a], "second": labels[b]} | p.as_json() for (a, b), p in section.pairs.items()
            ]
        return {"runs": runs, "rows": rows, "pairs": pairs}


def compare(results: list[Result]) -> Comparison:
    """Rank the finished runs of each dataset and device."""
    together: dict[str, list[Result]] = {}
    for result in results:
        if result.finished:
            key = json.dumps([result.record["dataset"], result.data_md5, result.device], sort_keys=True)
            together.setdefault(key, []).append(result)
    firsts = [group[0] for group in together.values()]
    titles = {id(first): _title(first, firsts) for first in firsts}
    sections = [Section(titles[id(group[0])], _rows(group)) for group in together.values()]
    return Comparison(sorted(sections, key=lambda s: (s.synthetic, s.title)), [r for r in results if not r.finished])


def _title(first: Result, all_firsts: list[Result]) -> str:
    """A table's title: its dataset and, where other tables have the same one, the files; likewise the device."""
    alike = [r for r in all_firsts if r.record["dataset"] == first.record["dataset"]]
    title = "SYNTHETIC data" if first.synthetic else first.record["dataset"]
    if len({json.dumps(r.data_md5, sort_keys=True) for r in alike}) > 1:
        files = ", ".join(f"{file} {md5[:8]}" for file, md5 in sorted(first.data_md5.items()))
        title += f" ({files or 'files not recorded'})"
    return title + (f" on {first.device}" if len({r.device for r in all_firsts}) > 1 else "")


def _rows(results: list[Result]) -> list[Row]:
    """The rows of one table, best accuracy first."""
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
    common = in_common([r.changed for r in firsts])

    def label(result: Result) -> str:
        recipe = result.recipe if several_recipes else ""
        place = f"on {result.place}" if several_places else ""
        mark = "SYNTHETIC" if result.synthetic else ""
        changed = assignments({n: value for n, value in result.changed.items() if n not in common})
        return " ".join(part for part in (mark, result.model, recipe, changed, place) if part)

    def rank(row: Row) -> tuple[float, str]:
        mean = row.mean(ACCURACY)
        return 1.0 if mean is None else -mean, row.label

    alike = Counter(map(label, firsts))
    rows = [Row(label(g[0]) + (f" ({g[0].name})" if alike[label(g[0])] > 1 else ""), g) for g in groups.values()]
    return sorted(rows, key=rank)
