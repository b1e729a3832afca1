"""Numbers with their uncertainty: intervals for proportions and means, and paired tests of before against after.

All functions are pure and need NumPy and the standard library alone. Intervals are at 95 %.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Z_95 = 1.959963984540054
"""97.5 % quantile of the normal distribution."""

BOOTSTRAP_SEED = 0x0B007


@dataclass(frozen=True)
class Estimate:
    """A value and the ends of its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """Paired difference after - before on the same rows: its mean with a 95 % interval, and a two-sided p-value."""

    difference: Estimate
    p_value: float
    n: int

    @property
    def improved(self) -> bool:
        """True when the whole interval lies above zero and the test agrees."""
        return self.difference.low > 0 and self.p_value < 0.05

    @property
    def worsened(self) -> bool:
        """True when the whole interval lies below zero and the test agrees."""
        return self.difference.high < 0 and self.p_value < 0.05


def wilson(successes: int, n: int) -> Estimate:
    """Score interval of a proportion (Wilson 1927), which stays inside [0, 1] and is honest at 0 and n successes.

    Raises ValueError unless 0 <= successes <= n and n >= 1.
    """
    if not 0 <= successes <= n or n < 1:
        raise ValueError(f"successes: {successes} of {n} is no proportion; give 0 <= successes <= n, n at least 1")
    share, z2 = successes / n, Z_95**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z_95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == n else centre + half
    return Estimate(share, low, high)


def mean_interval(values: Sequence[float]) -> Estimate:
    """Mean with Student's t interval. One value has no spread to judge by: its interval is everything."""
    numbers = _numbers(values)
    mean = float(numbers.mean())
    if len(numbers) == 1:
        return Estimate(mean, -math.inf, math.inf)
    half = t_quantile(0.975, len(numbers) - 1) * float(numbers.std(ddof=1)) / math.sqrt(len(numbers))
    return Estimate(mean, mean - half, mean + half)


def mcnemar(before: Sequence[bool], after: Sequence[bool]) -> float:
    """Exact two-sided p-value that as many rows were lost as won (McNemar 1947, by the binomial distribution)."""
    pairs = list(zip(before, after, strict=True))
    won = sum(bool(new) and not old for old, new in pairs)
    lost = sum(bool(old) and not new for old, new in pairs)
    changed = won + lost
    if changed == 0:
        return 1.0
    tail = sum(math.comb(changed, k) for k in range(min(won, lost) + 1)) / 2**changed
    return min(1.0, 2 * tail)


def paired_bootstrap(before: Sequence[float], after: Sequence[float], resamples: int = 10_000) -> Comparison:
    """Resample rows, keeping each row's two scores together: percentile interval of the mean difference.

    The p-value is twice the smaller share of resamples on the other side of zero, ties counted as contrary. The same
    scores give the same numbers: the generator's seed is fixed.
    """
    difference = _numbers(after) - _numbers(before)
    n = len(difference)
    generator = np.random.default_rng(BOOTSTRAP_SEED)
    chunks = [min(1000, resamples - at) for at in range(0, resamples, 1000)]
    means = np.concatenate([difference[generator.integers(0, n, (chunk, n))].mean(1) for chunk in chunks])
    low, high = np.quantile(means, [0.025, 0.975])
    tail = min(np.mean(means <= 0), np.mean(means >= 0))
    p_value = min(1.0, 2 * (float(tail) * resamples + 1) / (resamples + 1))
    return Comparison(Estimate(float(difference.mean()), float(low), float(high)), p_value, n)


def compare(before: Sequence[float], after: Sequence[float]) -> Comparison:
    """Compare two runs over the same rows: bootstrap interval; McNemar's exact test where every score is 0 or 1.

    Raises ValueError when the rows do not match in number.
    """
    if len(before) != len(after):
        raise ValueError(
            f"scores: {len(before)} rows before and {len(after)} after; a paired test needs the same rows, so evaluate "
            "both with the same recipe and rows"
        )
    comparison = paired_bootstrap(before, after)
    if all(score in (0.0, 1.0) for score in (*before, *after)):
        p_value = mcnemar([score == 1.0 for score in before], [score == 1.0 for score in after])
        return Comparison(comparison.difference, p_value, comparison.n)
    return comparison


def t_quantile(probability: float, degrees: int) -> float:
    """Quantile of Student's t, for probability in [0.5, 1), by bisection on the distribution function."""
    if not 0.5 <= probability < 1 or degrees < 1:
        raise ValueError(f"probability: {probability} with {degrees} degrees of freedom; give [0.5, 1) and at least 1")
    low, high = 0.0, 1.0
    while _t_cdf(high, degrees) < probability:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_cdf(middle, degrees) < probability else (low, middle)
    return (low + high) / 2


def _t_cdf(t: float, degrees: int) -> float:
    """Distribution function of Student's t for t >= 0: the finite series of Abramowitz and Stegun 26.7.3 and 26.7.4."""
    angle = math.atan2(t, math.sqrt(degrees))
    cosine2 = math.cos(angle) ** 2
    if degrees % 2:
        term, total = math.cos(angle), 0.0
        for k in range(1, (degrees - 1) // 2 + 1):
            total += term
            term *= cosine2 * 2 * k / (2 * k + 1)
        within = 2 / math.pi * (angle + math.sin(angle) * total)
    else:
        term, total = 1.0, 0.0
        for k in range(1, degrees // 2 + 1):
            total += term
            term *= cosine2 * (2 * k - 1) / (2 * k)
        within = math.sin(angle) * total
    return 0.5 + within / 2


def _numbers(values: Sequence[float]) -> np.ndarray:
    numbers = np.asarray(values, dtype=np.float64)
    if not len(numbers) or not np.isfinite(numbers).all():
        raise ValueError(f"scores: {len(numbers)} values, finite ones needed and at least one; evaluate some rows")
    return numbers
