"""Comparison of two models on the same questions, for `verl eval --against` and `verl report`: a paired test and an interval.

Dimensions: Q questions, P patterns of signs.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from verl.eval.intervals import SEED, Interval, are_right_or_wrong, bootstrap_interval, wilson_interval

MOST_EXACT = 16  # questions that differ, of which all patterns of signs are counted
PATTERNS = 20_000  # patterns that are drawn where there are more
AT_A_TIME = 10_000_000  # signs in memory


@dataclass(frozen=True)
class Comparison:
    """The difference of two models' mean scores.

    Attributes:
        questions: number of questions that both answered.
        score, other_score: their means over these questions.
        difference: score − other_score.
        interval: 95% confidence interval of the difference.
        p_value: two-sided: how likely a difference of this size or more is if both models are equally good.
        better, worse: number of questions with a higher and a lower score than the other model's.
        test, interval_method: names of the methods.
    """

    questions: int
    score: float
    other_score: float
    difference: float
    interval: Interval
    p_value: float
    better: int
    worse: int
    test: str
    interval_method: str


def compare(scores: Sequence[float], others: Sequence[float]) -> Comparison:
    """Compare the scores of two models, one pair for each question."""
    n = len(scores)
    better, worse = sum(a > b for a, b in zip(scores, others, strict=True)), sum(a < b for a, b in zip(scores, others, strict=True))
    if are_right_or_wrong([*scores, *others]):
        both = sum(a == b == 1 for a, b in zip(scores, others, strict=True))
        p_value, test = mcnemar(better, worse), "exact McNemar test"
        interval, method = newcombe_interval(both, better, worse, n - both - better - worse), "Newcombe 1998, method 10"
    else:
        differences = [a - b for a, b in zip(scores, others, strict=True)]
        p_value, test = sign_flips(differences), "paired permutation test (sign flips)"
        interval, method = bootstrap_interval(differences), "paired bootstrap"
    score, other = sum(scores) / n, sum(others) / n
    return Comparison(n, score, other, score - other, interval, p_value, better, worse, test, method)


def mcnemar(better: int, worse: int) -> float:
    """Return the two-sided p-value of McNemar's exact test (McNemar 1947): of the questions that only one model answers, each has half."""
    n, fewer = better + worse, min(better, worse)
    tail = sum(math.comb(n, k) for k in range(fewer + 1))
    return min(1.0, float(2 * tail / 2**n))


def newcombe_interval(both: int, first: int, second: int, neither: int) -> Interval:
    """Return the 95% interval of the difference of two paired proportions (Newcombe 1998, Statistics in Medicine 17, 2635, method 10).

    It combines Wilson's intervals of both proportions, with their correlation. It stays within -1 and 1, and does not shrink to nothing
    if the models agree everywhere.

    Args:
        both, first, second, neither: number of questions that both models, only the first, only the second, and neither answered.
    """
    n = both + first + second + neither
    p, q = (both + first) / n, (both + second) / n
    bounds, other_bounds = wilson_interval(p, n), wilson_interval(q, n)
    assert bounds is not None and other_bounds is not None
    product = (both + first) * (second + neither) * (both + second) * (first + neither)
    covariance = both * neither - first * second
    correlation = 0.0
    if product:
        correlation = (max(covariance - n / 2, 0.0) if covariance > 0 else covariance) / math.sqrt(product)

    def half(a: float, b: float) -> float:
        return math.sqrt(max(0.0, a * a - 2 * correlation * a * b + b * b))

    return p - q - half(p - bounds[0], other_bounds[1] - q), p - q + half(bounds[1] - p, q - other_bounds[0])


def sign_flips(differences: Sequence[float]) -> float:
    """Return the two-sided p-value of the paired permutation test (Fisher 1935): of equal models, each difference may have either sign.

    All patterns of signs are counted if few questions differ; else random ones, and the observed one (Phipson and Smyth 2010).
    """
    differing_Q = np.array([difference for difference in differences if difference != 0.0])
    n = len(differing_Q)
    observed = abs(differing_Q.sum()) * (1 - 1e-12)  # sums in another order are equal
    if n <= MOST_EXACT:
        signs_PQ = 1 - 2 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
        return float(np.mean(np.abs(signs_PQ @ differing_Q) >= observed))
    generator, reached = np.random.default_rng(SEED), 0
    at_a_time = max(1, min(PATTERNS, AT_A_TIME // n))
    for start in range(0, PATTERNS, at_a_time):
        signs_PQ = 1 - 2 * generator.integers(2, size=(min(at_a_time, PATTERNS - start), n), dtype=np.int8)
        reached += int(np.sum(np.abs(signs_PQ @ differing_Q) >= observed))
    return (reached + 1) / (PATTERNS + 1)
