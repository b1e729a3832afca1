"""Intervals and tests against published values."""

import math

import numpy as np
import pytest
from shipyard.evals.metrics import compare, mcnemar, mean_interval, paired_bootstrap, t_quantile, wilson


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998, table I, method 3
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_equals_newcombes_table(successes: int, n: int, low: float, high: float):
    estimate = wilson(successes, n)
    assert estimate.value == successes / n
    assert (round(estimate.low, 4), round(estimate.high, 4)) == (low, high)


def test_wilson_stays_inside_and_mirrors():
    full, none = wilson(10, 10), wilson(0, 10)
    assert full.high == 1.0
    assert none.low == 0.0
    assert full.low == pytest.approx(1 - none.high)


@pytest.mark.parametrize(("successes", "n"), [(-1, 5), (6, 5), (0, 0)])
def test_wilson_refuses_what_is_no_proportion(successes: int, n: int):
    with pytest.raises(ValueError, match=r"successes: .*no proportion; give"):
        wilson(successes, n)


@pytest.mark.parametrize(
    ("degrees", "published"),
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (9, 2.2622), (10, 2.2281), (30, 2.0423), (120, 1.9799)],
)
def test_t_quantile_equals_the_tables(degrees: int, published: float):
    assert t_quantile(0.975, degrees) == pytest.approx(published, abs=5e-5)


def test_mean_interval_by_hand():
    # mean 3, sample variance 2.5, t(4) = 2.776445: half width 2.776445 * sqrt(2.5 / 5)
    estimate = mean_interval([1, 2, 3, 4, 5])
    assert estimate.value == 3
    assert estimate.high - 3 == pytest.approx(1.963243, abs=1e-6)
    assert 3 - estimate.low == pytest.approx(1.963243, abs=1e-6)
    assert math.isinf(mean_interval([2.0]).high)


def test_mcnemar_by_hand():
    # 6 lost, 16 won: 2 * sum_{k<=6} C(22, k) / 2^22 = 2 * 110056 / 4194304
    before = [True] * 6 + [False] * 16 + [True] * 30
    after = [False] * 6 + [True] * 16 + [True] * 30
    assert mcnemar(before, after) == pytest.approx(2 * 110056 / 2**22)
    assert mcnemar([True, False], [True, False]) == 1.0


def test_compare_sees_what_two_intervals_cannot():
    """Rows that only ever improve: each interval covers the other's value, the paired test is certain."""
    before = [1.0] * 50 + [0.0] * 50
    after = [1.0] * 59 + [0.0] * 41
    assert wilson(50, 100).high > wilson(59, 100).low
    comparison = compare(before, after)
    assert comparison.improved
    assert not comparison.worsened
    assert comparison.p_value == pytest.approx(2 / 2**9)
    assert comparison.difference.value == pytest.approx(0.09)
    assert compare(after, before).worsened


def test_compare_says_no_for_noise():
    scores = np.random.default_rng(3).integers(0, 2, (2, 300)).astype(float)
    comparison = compare(scores[0].tolist(), scores[1].tolist())
    assert not comparison.improved
    assert not comparison.worsened


def test_bootstrap_interval_covers_as_often_as_it_says():
    generator = np.random.default_rng(5)
    covered = 0
    for _ in range(200):
        before, after = generator.normal(0, 1, 60), generator.normal(0.3, 1, 60)
        estimate = paired_bootstrap(before.tolist(), after.tolist(), resamples=1000).difference
        covered += estimate.low <= 0.3 <= estimate.high
    assert 180 <= covered <= 198  # 95 % of 200, less what 60 rows cost a percentile interval


def test_compare_refuses_other_rows():
    with pytest.raises(ValueError, match="scores: 3 rows before and 2 after"):
        compare([1, 0, 1], [1, 0])
    with pytest.raises(ValueError, match="finite"):
        compare([1.0, math.nan], [1.0, 0.0])
