"""Which of two rows is better, and whether the data carry it: both saw the same test images, so they are paired.

Of two rows the test is made on every pair of their runs, and the weakest pair counts: the one row is better if each
of its runs is better than each of the other's (an intersection-union test: R. L. Berger, Technometrics 24, 1982).
"""

from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import numpy as np

from fashion_ddp.report.results import Answers, Result
from fashion_ddp.report.statistics import Interval, bootstrap, holm, mcnemar, percentile_interval

LEVEL = 0.05


@dataclass(frozen=True)
class Pair:
    """Two rows. The interval is of the difference of their mean accuracies, over redrawn images and, where a row has
    several runs, redrawn runs."""

    difference: float  # of mean accuracies, first minus second; not negative
    interval: Interval  # 95 %, paired bootstrap
    tested: int  # pairs of runs, one from each row
    only_first: int  # images that only the first row's run gets right, in the weakest of those pairs
    only_second: int
    p: float  # exact McNemar of the weakest pair; 1 where the second row's run is not worse there
    p_holm: float  # adjusted for all pairs of rows of the table

    @property
    def significant(self) -> bool:
        return self.p_holm < LEVEL and self.interval.low > 0

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"significant": self.significant}


def compare_pairs(rows: list[list[Result]]) -> dict[tuple[int, int], Pair]:
    """Each pair of rows by their places, the earlier first. `rows`: their runs, rows in order of mean accuracy.

    Left out is a row of which a run has no predictions, or not for the same labels as those before it.
    """
    answered: dict[int, list[Answers]] = {}
    for place, row in enumerate(rows):
        of_row = [result.answers for result in row if result.answers is not None]
        like = next(iter(answered.values()), of_row)[:1]
        if len(of_row) == len(row) and all(np.array_equal(a.labels, like[0].labels) for a in of_row):
            answered[place] = of_row
    if len(answered) < 2:
        return {}
    correct = np.stack([a.correct for of_row in answered.values() for a in of_row])
    ends = np.cumsum([len(of_row) for of_row in answered.values()])
    groups = {place: range(end - len(rows[place]), end) for place, end in zip(answered, ends, strict=True)}
    exact = correct.astype(np.float64)
    both = (exact @ exact.T).astype(int)  # images that two runs both get right
    resampled = dict(zip(groups, bootstrap(correct, list(groups.values())).T, strict=True))
    means = {place: correct[list(group)].mean() for place, group in groups.items()}

    def weakest(first: range, second: range) -> tuple[float, int, int]:
        tests = []
        for a in first:
            for b in second:
                only_a, only_b = int(both[a, a] - both[a, b]), int(both[b, b] - both[a, b])
                tests.append((mcnemar(only_a, only_b) if only_a > only_b else 1.0, only_b - only_a, only_a, only_b))
        p, _, only_a, only_b = max(tests)
        return p, only_a, only_b

    places = list(combinations(groups, 2))
    found = {(a, b): weakest(groups[a], groups[b]) for a, b in places}
    adjusted = dict(zip(places, holm([found[place][0] for place in places]), strict=True))
    return {
        (a, b): Pair(
            difference=float(means[a] - means[b]),
            interval=percentile_interval(resampled[a] - resampled[b]),
            tested=len(groups[a]) * len(groups[b]),
            only_first=only_a,
            only_second=only_b,
            p=p,
            p_holm=adjusted[a, b],
        )
        for (a, b), (p, only_a, only_b) in found.items()
    }
