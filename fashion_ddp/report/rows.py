"""Group runs into rows, and rows into tables.

A table holds finished runs on the same data and the same kind of device. A row holds runs that differ only in the seed,
and shows their mean and sample standard deviation.
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
    Result,
    own_figures,
)
from fashion_ddp.report.statistics import Interval, t_interval, wilson
from fashion_ddp.report.text import common_settings, settings_text

FIGURES = (ACCURACY, LOSS, TTA, BALANCED, TOP5, MACRO_F1, CALIBRATION, SECONDS, IMAGES_PER_S, MEMORY)


@dataclass(frozen=True)
class Row:
    """Runs that differ only in the seed. `label` is unique in its table."""

    label: str
    results: list[Result]

    @property
    def first(self) -> Result:
        return self.results[0]

    def mean(self, name: str) -> float | None:
        """Return a figure's mean over the runs; None where a run does not have it, or not a finite one."""
        values = [r.record[name] for r in self.results if r.record.get(name) is not None]
        return statistics.fmean(values) if len(values) == len(self.results) else None

    def std(self, name: str) -> float | None:
        """Return a figure's sample standard deviation (n - 1); None for a single run."""
        several = len(self.results) > 1 and self.mean(name) is not None
        return statistics.stdev(r.record[name] for r in self.results) if several else None

    def interval(self) -> Interval | None:
        """Return the 95 % interval of the accuracy: Wilson's for one seed, Student's t over three or more seeds.

        None for two seeds, or for one without predictions.
        """
        if self.mean(ACCURACY) is None:
            return None
        if len(self.results) > 2:
            low, high = t_interval([r.record[ACCURACY] for r in self.results])
            return Interval(max(0.0, low), min(1.0, high))
        if len(self.results) == 1 and (predictions := self.first.predictions):
            return wilson(int(predictions.correct.sum()), len(predictions.labels))
        return None

    @property
    def concurrent_runs(self) -> list[int]:
        """Return each number of runs that were trained at the same time: [1] if each run had the machine to itself."""
        return sorted({r.concurrent_runs for r in self.results})

    @property
    def shared(self) -> bool:
        """Return whether its runs shared the machine with others, so that their times do not measure speed."""
        return self.concurrent_runs != [1]

    def confusion(self) -> np.ndarray | None:
        """Return counts [true, predicted], added over the runs that have predictions; None without any."""
        counts = [np.array(r.record["confusion"]) for r in self.results if "confusion" in r.record]
        return sum(counts[1:], counts[0]) if counts else None

    def by_class(self, figure: str) -> list[float] | None:
        """Return a figure (f1, recall) of each class, the mean over the runs; None without predictions."""
        every = [r.record[f"{figure}_by_class"] for r in self.results if f"{figure}_by_class" in r.record]
        return np.mean(every, axis=0).tolist() if every else None

    def as_json(self) -> dict[str, Any]:
        def each(figure: Callable[[str], float | None]) -> dict[str, float | None]:
            return {name: figure(name) for name in (*FIGURES, *own_figures(self.results))}

        of_row: dict[str, Any] = {"label": self.label, "runs": [r.name for r in self.results], "n": len(self.results)}
        of_row |= {"mean": each(self.mean), "std": each(self.std), "interval": self.interval()}
        of_row |= {"side_by_side": max(self.concurrent_runs)}
        return of_row | {f"{figure}_by_class": self.by_class(figure) for figure in ("f1", "recall")}


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
        """Return the rows that have an accuracy. Rows whose figures are not finite come after them in `rows`."""
        return [row for row in self.rows if row.mean(ACCURACY) is not None]

    @property
    def offers_choice(self) -> bool:
        """Return whether several rows are of one model with different settings, of which somebody may choose one."""
        return len({row.first.model for row in self.rows}) < len(self.rows)

    @property
    def unbalanced(self) -> bool:
        """Return whether the classes have unlike numbers of test images."""
        counts = self.rows[0].confusion()
        return counts is not None and len(set(counts.sum(axis=1).tolist())) > 1

    @functools.cached_property
    def pairs(self) -> dict[tuple[int, int], Pair]:
        """Return comparisons by the indices of two rows, the better first; {} if no runs share the same test images."""
        return compare_pairs([row.results for row in self.ranked])

    @property
    def best(self) -> Row | None:
        """Return the first row if it is significantly better than every other one, else None."""
        others = [(0, other) for other in range(1, len(self.ranked))]
        better = [pair in self.pairs and self.pairs[pair].significant for pair in others]
        return self.rows[0] if better and all(better) else None


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
        """Return the content of report.json."""
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
    """Group the finished runs by dataset and device, and rank them."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        if result.finished:
            key = json.dumps([result.record["dataset"], result.data_md5, result.device], sort_keys=True)
            groups.setdefault(key, []).append(result)
    firsts = [group[0] for group in groups.values()]
    titles = {id(first): _title(first, firsts) for first in firsts}
    sections = [Section(titles[id(group[0])], _rows(group)) for group in groups.values()]
    return Comparison(sorted(sections, key=lambda s: (s.synthetic, s.title)), [r for r in results if not r.finished])


def _title(first: Result, all_firsts: list[Result]) -> str:
    """Return a table's title: its dataset, and its files and its device where those of other tables differ."""
    alike = [r for r in all_firsts if r.record["dataset"] == first.record["dataset"]]
    title = "SYNTHETIC data" if first.synthetic else first.record["dataset"]
    if len({json.dumps(r.data_md5, sort_keys=True) for r in alike}) > 1:
        files = ", ".join(f"{file} {md5[:8]}" for file, md5 in sorted(first.data_md5.items()))
        title += f" ({files or 'files not recorded'})"
    return title + (f" on {first.device}" if len({r.device for r in all_firsts}) > 1 else "")


def _rows(results: list[Result]) -> list[Row]:
    """Return the rows of one table, best accuracy first."""
    groups: dict[tuple[str, int], list[Result]] = {}
    seen: Counter[tuple[str, int]] = Counter()
    for result in sorted(results, key=lambda r: r.record["seed"]):
        # A repeated seed says nothing about the spread over seeds: it gets a row of its own.
        seed = result.experiment, result.record["seed"]
        groups.setdefault((result.experiment, seen[seed]), []).append(result)
        seen[seed] += 1
    firsts = [group[0] for group in groups.values()]
    several_recipes = len({r.recipe for r in firsts}) > 1
    several_places = len({r.ranks_and_device for r in firsts}) > 1
    common = common_settings([r.changed for r in firsts])

    def label(result: Result) -> str:
        recipe = result.recipe if several_recipes else ""
        place = f"on {result.ranks_and_device}" if several_places else ""
        mark = "SYNTHETIC" if result.synthetic else ""
        changed = settings_text({n: value for n, value in result.changed.items() if n not in common})
        return " ".join(part for part in (mark, result.model, recipe, changed, place) if part)

    def rank(row: Row) -> tuple[float, str]:
        mean = row.mean(ACCURACY)
        return 1.0 if mean is None else -mean, row.label

    alike = Counter(map(label, firsts))
    rows = [Row(label(g[0]) + (f" ({g[0].name})" if alike[label(g[0])] > 1 else ""), g) for g in groups.values()]
    return sorted(rows, key=rank)
