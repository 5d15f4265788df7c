"""The statistics against values that others published, and against torchmetrics."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import multiclass_f1_score

from fashion_ddp.report import statistics

pytestmark = pytest.mark.quick


# R. G. Newcombe, "Two-sided confidence intervals for the single proportion", Statistics in Medicine 17 (1998), table I,
# method 3 (score, without continuity correction).
@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson(hits: int, n: int, low: float, high: float) -> None:
    assert statistics.wilson(hits, n) == pytest.approx((low, high), abs=5e-5)
    assert statistics.wilson(n - hits, n) == pytest.approx((1 - high, 1 - low), abs=5e-5)


# The t table of any textbook, two-sided 95 %.
T_TABLE = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 9: 2.262, 10: 2.228, 29: 2.045, 60: 2.000, 120: 1.980}


@pytest.mark.parametrize(("df", "quantile"), T_TABLE.items())
def test_t_quantile(df: int, quantile: float) -> None:
    assert statistics.t_quantile(df) == pytest.approx(quantile, abs=5e-4)


def test_t_interval_of_student_s_own_example() -> None:
    # Hours of sleep gained (Student 1908); the interval is that of R's help for t.test, on its data set "sleep".
    gained = [1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4]
    assert statistics.t_interval(gained) == pytest.approx((0.7001142, 2.4598858), abs=5e-8)
    assert statistics.t_test(gained, 0.0) == pytest.approx(0.002833 / 2, abs=5e-7)  # R's is two-sided
    assert statistics.t_test([-hours for hours in gained], 0.0) == pytest.approx(1 - 0.002833 / 2, abs=5e-7)


@pytest.mark.parametrize(("first", "second"), [(0, 0), (0, 1), (5, 5), (5, 6), (3, 40), (900, 1100)])
def test_mcnemar_is_the_binomial_sum(first: int, second: int) -> None:
    # M. P. Fay, "Exact McNemar's test and matching confidence intervals" (vignette of R's exact2x2): 2 against 9.
    assert statistics.mcnemar(2, 9) == statistics.mcnemar(9, 2) == pytest.approx(0.06543, abs=5e-6)
    n = first + second
    tail = sum(Fraction(math.comb(n, k), 2**n) for k in range(min(first, second) + 1))
    assert statistics.mcnemar(first, second) == pytest.approx(float(min(Fraction(1), 2 * tail)), rel=1e-9)


def test_holm_of_a_published_example() -> None:
    # The example of Wikipedia's "Holm-Bonferroni method": at 0.05 the fourth and the first are rejected, no other.
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert statistics.holm([0.9, 0.8]) == [1.0, 1.0] and statistics.holm([]) == []


def answers() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(3000) % 10
    logits = torch.randn(3000, 10, generator=generator)
    logits[torch.arange(3000), labels] += 1.5
    return logits, labels


def test_f1_is_torchmetrics() -> None:
    logits, labels = answers()
    predicted = logits.argmax(1)
    counts = np.zeros((10, 10), dtype=int)
    np.add.at(counts, (labels.numpy(), predicted.numpy()), 1)
    theirs = multiclass_f1_score(predicted, labels, num_classes=10, average=None)
    assert statistics.f1_by_class(counts) == pytest.approx(theirs.numpy(), abs=1e-6)
    assert statistics.f1_by_class(np.array([[3, 0], [0, 0]])).tolist() == [1, 0]  # of a class that is never seen: 0


def test_bootstrap_agrees_with_the_normal_interval_of_a_paired_difference() -> None:
    random = np.random.default_rng(3)
    first = random.random(10_000) < 0.86
    second = np.where(random.random(10_000) < 0.1, random.random(10_000) < 0.5, first)  # mostly right together
    resampled = statistics.bootstrap(np.stack([first, second]), [[0], [1]])
    assert resampled.shape == (statistics.RESAMPLES, 2)
    low, high = statistics.percentile_interval(resampled[:, 0] - resampled[:, 1])
    difference = first.astype(float) - second
    half = 1.96 * difference.std() / 100
    assert (low, high) == pytest.approx((difference.mean() - half, difference.mean() + half), abs=0.1 * half)


def test_bootstrap_pairs_images_and_draws_runs() -> None:
    random = np.random.default_rng(4)
    runs = random.random((4, 2_000)) < np.array([0.9, 0.9, 0.5, 0.7])[:, None]
    resampled = statistics.bootstrap(runs, [[0], [0], [2, 3]])
    assert np.array_equal(resampled[:, 0], resampled[:, 1])  # the same images for each
    low, high = statistics.percentile_interval(resampled[:, 2])
    assert low < 0.55 and high > 0.65  # another pair of seeds might have been 0.5 twice, or 0.7 twice
    assert np.array_equal(resampled, statistics.bootstrap(runs, [[0], [0], [2, 3]]))  # the same each time
