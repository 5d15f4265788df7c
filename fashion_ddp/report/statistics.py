"""Compute the report's statistics, each with its source. Proportions and probabilities are fractions from 0 to 1.

This module does not know runs: it takes numbers and arrays, and returns numbers.
"""

import functools
import math
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import NamedTuple

import numpy as np

Z = 1.959963984540054  # standard normal quantile at 0.975: two-sided 95 %
RESAMPLES = 2_000


class Interval(NamedTuple):
    low: float
    high: float


# --- One figure -------------------------------------------------------------------------------------------------


def wilson(hits: int, n: int) -> Interval:
    """Return the 95 % score interval of a proportion: of hits among n independent samples.

    Source: E. B. Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22 (1927).
    """
    share, z2 = hits / n, Z * Z
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return Interval(max(0.0, middle - half), min(1.0, middle + half))


def t_interval(values: Sequence[float]) -> Interval:
    """Return the 95 % interval of the mean of two or more normally distributed values, not limited to 0 to 1.

    Source: Student, "The probable error of a mean", Biometrika 6 (1908).
    """
    n, mean = len(values), math.fsum(values) / len(values)
    variance = math.fsum((v - mean) ** 2 for v in values) / (n - 1)
    half = t_quantile(n - 1) * math.sqrt(variance / n)
    return Interval(mean - half, mean + half)


@functools.cache
def t_quantile(df: int) -> float:
    """Return the t for which 95 % of Student's distribution with `df` degrees of freedom lies between -t and t.

    Found by bisection.

    Source of the distribution's series: M. Abramowitz and I. A. Stegun, Handbook of Mathematical Functions (1964),
    26.7.3 and 26.7.4.
    """
    low, high = 0.0, 20.0
    while high - low > 1e-12:
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, df) < 0.95 else (low, middle)
    return low


def t_test(values: Sequence[float], threshold: float) -> float:
    """Return the one-sided p value for "the mean is not above the threshold", of two or more values that differ.

    Source: Student, "The probable error of a mean", Biometrika 6 (1908).
    """
    n = len(values)
    error = stdev(values) / math.sqrt(n)
    t = (fmean(values) - threshold) / error
    outside = (1 - _within(abs(t), n - 1)) / 2
    return outside if t > 0 else 1 - outside


def _within(t: float, df: int) -> float:
    """Return the share of Student's distribution with `df` degrees of freedom between -t and t."""
    angle = math.atan(t / math.sqrt(df))
    cos2 = math.cos(angle) ** 2
    odd = df % 2
    term, total = math.cos(angle) if odd else 1.0, 0.0
    for k in range(df // 2):
        total += term
        term *= cos2 * (2 * k + 1 + odd) / (2 * k + 2 + odd)
    return 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total


# --- Two classifiers on the same images -------------------------------------------------------------------------


def mcnemar(only_first: int, only_second: int) -> float:
    """Return the exact two-sided p value for "both classifiers are right equally often".

    `only_first` and `only_second` count the images that only one classifier gets right. Under the hypothesis, each such
    image is as likely to be the first one's as the second one's.

    Source: Q. McNemar, "Note on the sampling error of the difference between correlated proportions or percentages",
    Psychometrika 12 (1947), with the binomial distribution itself in place of its approximation. T. G. Dietterich
    (Neural Computation 10, 1998) recommends the test for classifiers that are trained once.
    """
    n, fewer = only_first + only_second, min(only_first, only_second)
    logs = _log_factorials(n)
    tail = logs[n] - logs[: fewer + 1] - logs[n - fewer : n + 1][::-1] - n * math.log(2)
    return min(1.0, 2 * float(np.exp(tail).sum()))


def _log_factorials(n: int) -> np.ndarray:
    return np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])


def holm(p: Sequence[float]) -> list[float]:
    """Adjust the p values of one family of tests: at most 5 % of all families have a false value below 0.05.

    Source: S. Holm, "A simple sequentially rejective multiple test procedure", Scand. J. Statistics 6 (1979).
    """
    adjusted, highest = [0.0] * len(p), 0.0
    for rank, index in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        highest = max(highest, min(1.0, (len(p) - rank) * p[index]))
        adjusted[index] = highest
    return adjusted


def bootstrap(correct: np.ndarray, groups: Sequence[Sequence[int]]) -> np.ndarray:
    """Return resampled mean accuracies of groups of runs: float64 [RESAMPLES, groups].

    `correct`: bool [runs, images], whether a run gets an image right. `groups`: each group's rows in it. Images are
    drawn with replacement, and so are the runs of a group, because other seeds would have given other runs. All groups
    share the same draws of images, so that differences of columns are paired; every call draws the same.
    Source: B. Efron and R. J. Tibshirani, An Introduction to the Bootstrap (1993), chapters 8 and 13; paired over the
    test set as P. Koehn, "Statistical significance tests for machine translation evaluation", EMNLP (2004).
    """
    generator = np.random.default_rng(0)
    # Images that the same runs get right are of one kind, and drawn together: a resample is a count per kind.
    kinds, counts = np.unique(np.packbits(correct, axis=0), axis=1, return_counts=True)
    right = np.unpackbits(kinds, axis=0, count=len(correct)).astype(np.float64)  # [runs, kinds]
    images = correct.shape[1]
    shares = counts / counts.sum()
    # In parts, to save memory: fifty runs have thousands of kinds.
    parts = [generator.multinomial(images, shares, size=RESAMPLES // 4) @ right.T for _ in range(4)]
    by_run = np.concatenate(parts) / images  # [RESAMPLES, runs]
    means = []
    for group in groups:
        drawn = generator.choice(np.asarray(group), size=(RESAMPLES, len(group)))
        means.append(np.take_along_axis(by_run, drawn, axis=1).mean(axis=1))
    return np.stack(means, axis=1)


def percentile_interval(resampled: np.ndarray) -> Interval:
    """Return the 95 % percentile interval. Source: Efron and Tibshirani (1993), chapter 13."""
    low, high = np.percentile(resampled, [2.5, 97.5])
    return Interval(float(low), float(high))


# --- One classifier's predictions -------------------------------------------------------------------------------


def f1_by_class(confusion: np.ndarray) -> np.ndarray:
    """Return the F1 of each class, 2 tp / (2 tp + fp + fn), from counts [true, predicted]; 0 where all three are 0.

    Their mean is the macro F1. Source: C. J. van Rijsbergen, Information Retrieval (1979), chapter 7.
    """
    hits = confusion.diagonal()
    either = confusion.sum(axis=0) + confusion.sum(axis=1)
    return 2 * hits / np.maximum(either, 1)
