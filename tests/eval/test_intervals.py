"""Intervals, pass@k, majority vote and paired tests, against published values and SciPy."""

import itertools
from math import isnan

import numpy as np
import pytest

from verl.eval.intervals import bootstrap_interval, interval_of, majority_vote, numbers_of_answers, pass_at_k, wilson_interval
from verl.eval.paired import compare, mcnemar, newcombe_interval, sign_flips


def test_the_interval_is_wilsons() -> None:
    """Against the values in Newcombe 1998, table I, method 3."""
    for right, n, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)):
        assert wilson_interval(right / n, n) == pytest.approx((low, high), abs=5e-5)
    assert wilson_interval(1.0, 4) == pytest.approx((0.5101, 1.0), abs=5e-5)
    assert wilson_interval(1.5, 4) is None


def test_scores_that_are_no_shares_have_the_interval_of_scipys_bootstrap() -> None:
    stats = pytest.importorskip("scipy.stats")
    scores = np.random.default_rng(0).beta(0.5, 0.8, size=300)
    found = stats.bootstrap((scores,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(1)).confidence_interval
    assert bootstrap_interval(scores.tolist()) == pytest.approx((found.low, found.high), abs=2e-3)
    assert bootstrap_interval(scores.tolist()) == bootstrap_interval(scores.tolist())


def test_the_bootstrap_draws_questions_not_answers() -> None:
    """Answers to one question are alike: as many independent ones would give a narrower interval."""
    each = np.random.default_rng(0).random(50)
    (low, high), method = interval_of([[score] * 8 for score in each.tolist()])
    assert method == "bootstrap" and (low, high) == bootstrap_interval(each.tolist())
    narrow, _ = interval_of([[score] for score in np.repeat(each, 8).tolist()])
    assert narrow[1] - narrow[0] < 0.5 * (high - low)
    assert interval_of([[1.0, 0.0], [0.0, 0.0]]) == (wilson_interval(0.25, 2), "wilson")


@pytest.mark.parametrize(("n", "right", "k"), [(5, 2, 1), (5, 2, 2), (5, 2, 4), (6, 0, 3), (6, 6, 2), (6, 1, 6), (7, 3, 5)])
def test_pass_at_k_is_the_share_of_draws_with_a_right_answer(n: int, right: int, k: int) -> None:
    """By counting all draws of k answers, which is what the estimator of Chen et al. 2021 stands for, not 1 - (1 - c/n)**k."""
    draws = list(itertools.combinations([True] * right + [False] * (n - right), k))
    assert pass_at_k(n, right, k) == pytest.approx(np.mean([any(draw) for draw in draws]))


def test_pass_at_k_is_the_formula_of_the_paper() -> None:
    """1 - prod(1 - k / arange(n - c + 1, n + 1)), the numerically stable form in figure 3 of the paper."""
    for n, right, k in ((200, 13, 10), (200, 13, 100), (100, 1, 1), (200, 150, 60)):
        product = 1.0 if n - right < k else 1 - np.prod(1 - k / np.arange(n - right + 1, n + 1))
        assert pass_at_k(n, right, k) == pytest.approx(product)
    assert [numbers_of_answers(n) for n in (1, 2, 3, 4, 5, 8)] == [[1], [1, 2], [1, 2, 3], [1, 2, 4], [1, 2, 4, 5], [1, 2, 4, 8]]


def test_the_most_frequent_answer_wins() -> None:
    assert majority_vote(["7", "8", "7"], [0.0, 1.0, 0.0]) == 0.0
    assert majority_vote(["8", "7", "8", None], [1.0, 0.0, 1.0, 0.0]) == 1.0
    assert majority_vote(["8", "7", None, None, None], [1.0, 0.0, 0.0, 0.0, 0.0]) == 0.5  # what is no answer does not vote
    assert majority_vote(["1", "2", "3"], [0.0, 0.0, 1.0]) == pytest.approx(1 / 3)
    assert majority_vote([None, None], [0.0, 0.0]) == 0.0


@pytest.mark.parametrize(("better", "worse"), [(6, 16), (16, 6), (0, 0), (0, 5), (1, 1), (7, 3), (300, 250)])
def test_mcnemars_test_is_the_binomial_test_of_scipy(better: int, worse: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    expected = stats.binomtest(better, better + worse, 0.5).pvalue if better + worse else 1.0
    assert mcnemar(better, worse) == pytest.approx(expected)


# Newcombe 1998, Statistics in Medicine 17, 2635, table III, method 10, which prints four digits: e, f, g, h, and the limits of (f - g) / n.
TABLE_III = [
    ((36, 12, 2, 0), (0.0569, 0.3404)),
    ((20, 12, 2, 16), (0.0562, 0.3292)),
    ((18, 12, 2, 18), (0.0562, 0.3290)),
    ((36, 14, 0, 0), (0.1528, 0.4167)),
    ((35, 14, 0, 1), (0.1461, 0.4175)),
    ((18, 14, 0, 18), (0.1441, 0.3963)),
    ((2, 97, 1, 0), (0.8721, 0.9854)),
    ((1, 97, 1, 1), (0.8736, 0.9850)),
    ((0, 29, 1, 0), (0.6666, 0.9882)),
    ((0, 30, 0, 0), (0.8395, 1.0)),
    ((54, 0, 0, 0), (-0.0664, 0.0664)),
    ((30, 0, 0, 24), (-0.0358, 0.0358)),
]


@pytest.mark.parametrize(("cells", "limits"), TABLE_III)
def test_the_interval_of_a_paired_difference_has_the_limits_in_the_paper(
    cells: tuple[int, int, int, int], limits: tuple[float, float]
) -> None:
    found = newcombe_interval(*cells)
    assert found == pytest.approx(limits, abs=1e-4)
    both, first, second, neither = cells
    low, high = newcombe_interval(both, second, first, neither)
    assert (-high, -low) == pytest.approx(found), "with the models exchanged"


def test_the_interval_of_a_paired_difference_is_newcombes() -> None:
    """Complete response before and after consolidation therapy (Cavo et al. 2012): -0.0621 (-0.1186 to -0.0046), as in chapter 8 of
    Fagerland, Lydersen and Laake, Statistical Analysis of Contingency Tables, whose R package contingencytables prints these figures."""
    assert newcombe_interval(59, 6, 16, 80) == pytest.approx((-0.1186, -0.0046), abs=5e-5)
    found = compare([1.0] * 65 + [0.0] * 96, [1.0] * 59 + [0.0] * 6 + [1.0] * 16 + [0.0] * 80)
    assert found.difference == pytest.approx(-0.0621, abs=5e-5) and found.interval == newcombe_interval(59, 6, 16, 80)
    assert (found.better, found.worse, found.test) == (6, 16, "exact McNemar test") and found.p_value == mcnemar(6, 16)


@pytest.mark.parametrize(("both", "rate", "other_rate"), [(0.4, 0.85, 0.43), (0.9, 0.98, 0.6)])
def test_the_interval_of_a_difference_holds_it_in_95_of_100_samples(both: float, rate: float, other_rate: float) -> None:
    random, truth, held = np.random.default_rng(2), both * rate + (1 - both) * other_rate - both, 0
    for _ in range(400):
        others = random.random(100) < both
        scores = np.where(others, random.random(100) < rate, random.random(100) < other_rate)
        low, high = compare(scores.astype(float).tolist(), others.astype(float).tolist()).interval
        held += low <= truth <= high
    assert 0.92 <= held / 400 <= 0.99


def test_models_that_agree_everywhere_still_have_an_interval() -> None:
    low, high = newcombe_interval(10, 0, 0, 0)
    assert low < 0 < high and not isnan(low)
    low, high = newcombe_interval(5, 0, 0, 5)
    assert low < 0 < high


@pytest.mark.parametrize("questions", [8, 16])
def test_scores_are_compared_by_the_permutation_test_of_scipy(questions: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    generator = np.random.default_rng(questions)
    scores = generator.random(questions)
    others = np.clip(scores - 0.1 + 0.3 * generator.standard_normal(questions), 0, 1)

    def mean_difference(a: np.ndarray, b: np.ndarray, axis: int = -1) -> np.ndarray:
        return np.mean(a - b, axis=axis)

    exact = stats.permutation_test((scores, others), mean_difference, permutation_type="samples", n_resamples=np.inf).pvalue
    assert sign_flips((scores - others).tolist()) == pytest.approx(exact)
    found = compare(scores.tolist(), others.tolist())
    assert found.p_value == pytest.approx(exact) and found.interval == bootstrap_interval((scores - others).tolist())


def test_many_scores_are_compared_by_patterns_that_are_drawn() -> None:
    stats = pytest.importorskip("scipy.stats")
    differences = np.random.default_rng(3).normal(0.02, 0.3, size=500)
    assert sign_flips(differences.tolist()) == pytest.approx(stats.ttest_1samp(differences, 0).pvalue, abs=0.02)
    assert sign_flips([0.5] * 500) == pytest.approx(1 / 20_001)
    assert sign_flips([0.0] * 5) == 1.0
