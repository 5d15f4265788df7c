"""Test which of two rows is better. Both were evaluated on the same test images, so the tests are paired.

Every pair of runs from two rows is tested, and the weakest pair counts: a row is better if each of its runs is better
than each of the other row's (an intersection-union test: R. L. Berger, Technometrics 24, 1982).
"""

from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import numpy as np

from fashion_ddp.report.results import Predictions, Result
from fashion_ddp.report.statistics import Interval, bootstrap, holm, mcnemar, percentile_interval

LEVEL = 0.05


@dataclass(frozen=True)
class Pair:
    """The comparison of two rows.

    The interval is of the difference of their mean accuracies, over resampled images and, where a row has several runs,
    resampled runs.
    """

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
    """Compare each pair of rows; keys are the rows' indices, the earlier first.

    `rows`: the runs of each row, rows in order of mean accuracy. A row is left out if one of its runs has no
    predictions, or predictions for other labels than the rows before it.
    """
    comparable: dict[int, list[Predictions]] = {}
    for index, row in enumerate(rows):
        of_row = [result.predictions for result in row if result.predictions is not None]
        reference = next(iter(comparable.values()), of_row)[:1]
        if len(of_row) == len(row) and all(np.array_equal(p.labels, reference[0].labels) for p in of_row):
            comparable[index] = of_row
    if len(comparable) < 2:
        return {}
    correct = np.stack([p.correct for of_row in comparable.values() for p in of_row])
    ends = np.cumsum([len(of_row) for of_row in comparable.values()])
    groups = {index: range(end - len(rows[index]), end) for index, end in zip(comparable, ends, strict=True)}
    exact = correct.astype(np.float64)
    both = (exact @ exact.T).astype(int)  # images that two runs both get right
    resampled = dict(zip(groups, bootstrap(correct, list(groups.values())).T, strict=True))
    means = {index: correct[list(group)].mean() for index, group in groups.items()}

    def weakest(first: range, second: range) -> tuple[float, int, int]:
        """Return p and both counts of images that only one gets right, for the weakest pair of runs."""
        tests = []
        for a in first:
            for b in second:
                only_a, only_b = int(both[a, a] - both[a, b]), int(both[b, b] - both[a, b])
                tests.append((mcnemar(only_a, only_b) if only_a > only_b else 1.0, only_b - only_a, only_a, only_b))
        p, _, only_a, only_b = max(tests)
        return p, only_a, only_b

    pairs = list(combinations(groups, 2))
    tested = {(a, b): weakest(groups[a], groups[b]) for a, b in pairs}
    adjusted = dict(zip(pairs, holm([tested[pair][0] for pair in pairs]), strict=True))
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
        for (a, b), (p, only_a, only_b) in tested.items()
    }
