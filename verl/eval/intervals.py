"""Confidence intervals of scores, pass@k and majority vote. Random numbers have a fixed seed: the same answers give the same figures.

Dimensions: Q questions, R resamples.
"""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

Z_95 = 1.959964  # 97.5th percentile of the normal distribution
RESAMPLES, FEWEST_RESAMPLES = 10_000, 1_000
MOST_DRAWS = 200_000_000  # random numbers of one interval: some seconds
SEED = 20_210_707
WILSON, BOOTSTRAP = "wilson", "bootstrap"

Interval = tuple[float, float]


def wilson_interval(share: float, n: int) -> Interval | None:
    """Return Wilson's 95% confidence interval of a proportion in n independent trials (Wilson 1927); None if it is not in [0, 1].

    Several answers to one question are not independent, so n counts questions. With several answers, the interval is a little too wide.
    """
    if not 0.0 <= share <= 1.0:
        return None
    z2 = Z_95**2
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z_95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def bootstrap_interval(scores: Sequence[float]) -> Interval:
    """Return the 95% interval of a mean by the percentile bootstrap (Efron 1979), which draws questions with replacement.

    Args:
        scores: one score per question.
    """
    scores_Q = np.asarray(scores, dtype=np.float64)
    generator = np.random.default_rng(SEED)
    resamples = max(FEWEST_RESAMPLES, min(RESAMPLES, MOST_DRAWS // len(scores_Q)))
    means_R = np.array([scores_Q[generator.integers(len(scores_Q), size=len(scores_Q))].mean() for _ in range(resamples)])
    low, high = np.quantile(means_R, [0.025, 0.975])
    return float(low), float(high)


def are_right_or_wrong(scores: Sequence[float]) -> bool:
    """Return whether all scores are 0 or 1."""
    return all(score in (0.0, 1.0) for score in scores)


def interval_of(scores: Sequence[Sequence[float]]) -> tuple[Interval, str]:
    """Return the 95% interval of a mean score, and its method: Wilson's for right and wrong answers, else the bootstrap.

    Args:
        scores: of each question, those of its answers.
    """
    means = [sum(of_one) / len(of_one) for of_one in scores]
    if not are_right_or_wrong([score for of_one in scores for score in of_one]):
        return bootstrap_interval(means), BOOTSTRAP
    found = wilson_interval(min(1.0, sum(means) / len(means)), len(means))
    assert found is not None
    return found, WILSON


def pass_at_k(n: int, right: int, k: int) -> float:
    """Return the unbiased estimate of the probability that one of k answers is right (Chen et al. 2021, arXiv:2107.03374, section 2.1).

    Args:
        n: number of answers to the question, at least k.
        right: how many of them are right.
    """
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def numbers_of_answers(n: int) -> list[int]:
    """Return the k of pass@k for n answers: the powers of two below n, and n."""
    return [2**power for power in range((n - 1).bit_length())] + [n] if n > 1 else [1]


def majority_vote(answers: Sequence[str | None], scores: Sequence[float]) -> float:
    """Return the score of the most frequent answer to a question: 1 if it is right.

    Of equally frequent answers one would be drawn, so the result is the share of right ones. Answers that could not be extracted do not
    vote.

    Args:
        answers: the extracted answers.
        scores: 1 for a right answer, else 0; equal answers may have been written differently, so the first score of an answer counts.
    """
    votes = Counter(answer for answer in answers if answer is not None)
    if not votes:
        return 0.0
    most = max(votes.values())
    first = dict(zip(reversed(answers), reversed(scores), strict=True))
    leading = [first[answer] for answer, count in votes.items() if count == most]
    return sum(leading) / len(leading)
