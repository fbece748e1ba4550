"""Confidence intervals of evaluations, and paired tests of two of them, with SciPy."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000
SEED = 1
Z_95 = 1.959964  # 97.5th percentile of the normal distribution
WILSON, BOOTSTRAP = "Wilson", "bootstrap"
MCNEMAR, SIGN_FLIPS, NO_DIFFERENCE = "exact McNemar test", "paired permutation test", "no answer differs"


@dataclass(frozen=True)
class Interval:
    """A 95% confidence interval, and the method that gave it."""

    low: float
    high: float
    method: str


@dataclass(frozen=True)
class PairedTest:
    """What two evaluations of the same questions tell about the difference of their models.

    Attributes:
        difference: mean score of the second, minus that of the first.
        interval: its 95% confidence interval.
        p_value: two-sided; how likely a difference at least as large is if the models are equally good.
        method: name of the test.
    """

    difference: float
    interval: Interval
    p_value: float
    method: str


def interval_of(scores: Sequence[float]) -> Interval | None:
    """Return the interval of a mean over questions; None if there are too few of them.

    Args:
        scores: of each question, the mean score of its answers.
    """
    from scipy.stats import binomtest

    if not scores:
        return None
    if is_binary(scores):
        found = binomtest(round(sum(scores)), len(scores)).proportion_ci(0.95, method="wilson")
        return Interval(float(found.low), float(found.high), WILSON)
    return _bootstrapped(scores)


def is_binary(scores: Sequence[float]) -> bool:
    return all(score in (0.0, 1.0) for score in scores)


def compare(before: Sequence[float], after: Sequence[float]) -> PairedTest | None:
    """Compare the scores of the same questions in two evaluations; None if there are too few of them."""
    if len(before) < 2:
        return None
    if is_binary([*before, *after]):
        return _mcnemar(before, after)
    differences = [b - a for a, b in zip(before, after, strict=True)]
    interval = _bootstrapped(differences)
    return None if interval is None else PairedTest(float(np.mean(differences)), interval, *_flipped_signs(differences))


def _mcnemar(before: Sequence[float], after: Sequence[float]) -> PairedTest:
    """Return the exact McNemar test (McNemar 1947): of the answers that turned, right and wrong are equally likely.

    The interval of the difference is Agresti and Min's (2005), Wald's with half an answer added to each of the four cells.
    """
    from scipy.stats import binomtest

    right = sum(b > a for a, b in zip(before, after, strict=True))
    wrong = sum(b < a for a, b in zip(before, after, strict=True))
    n, p_value = len(before), float(binomtest(right, right + wrong, 0.5).pvalue) if right + wrong else 1.0
    middle = (right - wrong) / (n + 2)
    half = Z_95 * math.sqrt((right + wrong + 1) - (right - wrong) ** 2 / (n + 2)) / (n + 2)
    interval = Interval(max(-1.0, middle - half), min(1.0, middle + half), "Agresti–Min")
    return PairedTest((right - wrong) / n, interval, p_value, MCNEMAR if right + wrong else NO_DIFFERENCE)


def _bootstrapped(values: Sequence[float]) -> Interval | None:
    """Return the interval of a mean by resampling, with fixed random numbers."""
    if len(values) < 2:
        return None
    values_N, random = np.asarray(values, dtype=np.float64), np.random.default_rng(SEED)
    means = [float(random.choice(values_N, len(values_N)).mean()) for _ in range(RESAMPLES // 5)]
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(low), float(high), BOOTSTRAP)


def _flipped_signs(differences: Sequence[float]) -> tuple[float, str]:
    """Return the p-value of a mean: of models that are equally good, each question's difference could have the other sign as well."""
    from scipy.stats import permutation_test

    if not any(differences):
        return 1.0, NO_DIFFERENCE
    found = permutation_test(
        (np.asarray(differences, dtype=np.float64),),
        np.mean,
        permutation_type="samples",
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=500,
        rng=SEED,
    )
    return float(found.pvalue), SIGN_FLIPS
