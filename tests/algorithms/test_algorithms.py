"""Advantages, divergences and losses, beside tables that were computed by hand."""

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from verl.algorithms import dapo, dpo, dr_grpo, grpo, gspo, ppo, reinforce, rloo
from verl.algorithms._advantage import discounted_sums, generalized_advantages
from verl.algorithms._kl import AdaptiveKL, estimate
from verl.algorithms.answers import Answers
from verl.data.batch import VALUES, Batch
from verl.data.pack import collate
from verl.engine.contract import TokenOut, ValueOut
from verl.errors import UserError

pytestmark = pytest.mark.usefixtures("process_group")


def answers(rewards: list[float], groups: list[int], lengths: list[int] | None = None, **more: object) -> Answers:
    lengths = lengths or [2] * len(rewards)
    return Answers(
        reward_A=np.array(rewards, dtype=np.float32),
        group_A=np.array(groups),
        lengths_A=np.array(lengths),
        **{"truncated_A": np.zeros(len(rewards), dtype=bool), "max_new_tokens": 10, **more},  # type: ignore[arg-type]
    )


def of_answers(arrays: list[np.ndarray]) -> list[float]:
    """One number an answer, which all its tokens must have."""
    assert all(len(set(array.tolist())) == 1 and array.dtype == np.float32 for array in arrays)
    return [float(array[0]) for array in arrays]


def batch_of(lengths: list[int], **values: list[float]) -> Batch:
    """Answers behind prompts of two tokens; a value for each trained token."""
    documents = [(np.arange(n + 2, dtype=np.int32), np.arange(n + 2) >= 2) for n in lengths]
    ends = np.cumsum(lengths)[:-1]
    return collate(
        documents,
        range(len(lengths)),
        multiple_of_tokens=32,
        values={f"{name}_M": np.split(np.array(given, dtype=np.float32), ends) for name, given in values.items()},
    )


# Groups 7 and 3 lie mixed: of 7 the rewards are 1, 0, 0 (mean 1/3, deviation sqrt(1/3)), of 3 they are 1, 1 and of 5 they are 0, 4.
REWARDS, GROUPS = [1.0, 1.0, 0.0, 0.0, 1.0, 0.0, 4.0], [7, 3, 7, 7, 3, 5, 5]
TABLE = {
    grpo: [0.66667 / 0.57745, 0, -0.33333 / 0.57745, -0.33333 / 0.57745, 0, -2 / 2.82853, 2 / 2.82853],
    dr_grpo: [0.66667, 0, -0.33333, -0.33333, 0, -2, 2],
    rloo: [1, 0, -0.5, -0.5, 0, -4, 4],
    # of all seven the mean is 1 and the variance (0 + 0 + 1 + 1 + 0 + 1 + 9) / 7
    reinforce: [0, 0, -1 / 1.30941, -1 / 1.30941, 0, -1 / 1.30941, 3 / 1.30941],
}
TABLE |= {dapo: TABLE[grpo], gspo: TABLE[grpo]}


@pytest.mark.parametrize("method", TABLE, ids=lambda method: method.__name__)
def test_advantages_are_those_of_the_table(method: ModuleType) -> None:
    learned = method.advantages(answers(REWARDS, GROUPS), method.Settings())
    assert of_answers(learned.advantages) == pytest.approx(TABLE[method], abs=1e-4)
    assert learned.returns is None


@pytest.mark.parametrize("method", TABLE, ids=lambda method: method.__name__)
def test_others_are_compared_with_an_empty_answer_too(method: ModuleType) -> None:
    learned = method.advantages(answers(REWARDS, GROUPS, [2, 2, 0, 2, 2, 2, 0]), method.Settings())
    assert [len(array) for array in learned.advantages] == [2, 2, 0, 2, 2, 2, 0]
    found = of_answers([array for array in learned.advantages if len(array)])
    assert found == pytest.approx([TABLE[method][i] for i in (0, 1, 3, 4, 5)], abs=1e-4)


def test_a_critic_learns_nothing_of_an_empty_answer() -> None:
    values = [np.array([0.5, 0.25], dtype=np.float32), np.zeros(0, dtype=np.float32)]
    settings = ppo.Settings(gamma=1.0, lam=1.0, whiten_advantages=False)
    learned = ppo.advantages(answers([1.0, 3.0], [0, 1], [2, 0], values=values), settings)
    assert learned.returns is not None and [array.tolist() for array in learned.returns] == [[1.0, 1.0], []]
    assert [array.tolist() for array in learned.advantages] == [[0.5, 0.75], []]
    assert (learned.metrics["value"], learned.metrics["return"]) == (0.375, 1.0)


@pytest.mark.parametrize("method", TABLE, ids=lambda method: method.__name__)
def test_the_order_of_answers_does_not_matter(method: ModuleType) -> None:
    order = np.random.default_rng(0).permutation(len(REWARDS))
    shuffled = answers([REWARDS[i] for i in order], [GROUPS[i] for i in order])
    found = of_answers(method.advantages(shuffled, method.Settings()).advantages)
    assert found == pytest.approx([TABLE[method][i] for i in order], abs=1e-4)


def test_groups_without_spread_are_counted() -> None:
    assert grpo.advantages(answers(REWARDS, GROUPS), grpo.Settings()).metrics["groups_without_spread"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("method", [grpo, dr_grpo, rloo, dapo, gspo, reinforce], ids=lambda method: method.__name__)
def test_equal_rewards_teach_nothing(method: ModuleType) -> None:
    learned = method.advantages(answers([0.3] * 6, [0, 0, 0, 1, 1, 1]), method.Settings())
    assert of_answers(learned.advantages) == pytest.approx([0.0] * 6, abs=1e-6)


def test_an_answer_alone_in_its_group_is_a_users_error() -> None:
    with pytest.raises(UserError, match="alone in its group"):
        grpo.advantages(answers([1.0, 0.0, 1.0], [0, 0, 1]), grpo.Settings())


def test_a_rank_without_answers_gives_none() -> None:
    for method in (*TABLE, ppo):
        learned = method.advantages(answers([], [], [], values=[]), method.Settings())
        assert learned.advantages == []


def test_overlong_answers_lose_evenly_more_up_to_the_limit() -> None:
    """Limit 10, buffer 4: up to 6 tokens nothing, 8 half, 10 all; and all where an answer was cut off before."""
    settings = dapo.Settings(overlong_buffer_tokens=4, overlong_penalty=2.0, norm_by_std=False)
    cut = np.array([False, False, False, False, True, False])
    given = answers([1.0] * 6, [0] * 6, [2, 6, 8, 10, 3, 7], truncated_A=cut)
    learned = dapo.advantages(given, settings)
    lost = [0.0, 0.0, 1.0, 2.0, 2.0, 0.5]
    assert of_answers(learned.advantages) == pytest.approx([np.mean(lost) - x for x in lost], abs=1e-6)
    assert learned.metrics["overlong_deduction"] == pytest.approx(np.mean(lost))
    assert learned.metrics["groups_without_spread"] == pytest.approx(1), "what was earned is all the same; only deductions differ"


def test_generalized_advantages_are_those_of_the_table() -> None:
    """Rewards 0 0 1, values 0.5 0.4 0.2, gamma 0.9, lambda 0.8: TD errors -0.14, -0.22 and 0.8."""
    (found,) = generalized_advantages([np.array([0.0, 0.0, 1.0])], [np.array([0.5, 0.4, 0.2])], 0.9, 0.8)
    assert found.tolist() == pytest.approx([-0.14 + 0.72 * 0.356, 0.356, 0.8])


def random_answers(seed: int = 0) -> Answers:
    random = np.random.default_rng(seed)
    lengths = random.integers(1, 9, 12).tolist()
    arrays = [[random.standard_normal(n).astype(np.float32) for n in lengths] for _ in range(3)]
    return answers(random.standard_normal(12).tolist(), [0] * 12, lengths, old_logprobs=arrays[0], ref_logprobs=arrays[1], values=arrays[2])


def test_with_lambda_and_gamma_one_advantages_are_returns_less_values() -> None:
    given = random_answers()
    learned = ppo.advantages(given, ppo.Settings(whiten_advantages=False))
    for advantage, returned, value, reward in zip(learned.advantages, learned.returns, given.values, given.reward_A, strict=True):
        assert advantage + value == pytest.approx(np.full(len(value), reward), abs=1e-5)
        assert returned == pytest.approx(np.full(len(value), reward), abs=1e-5)


def test_with_lambda_zero_advantages_are_td_errors() -> None:
    (found,) = generalized_advantages([np.array([0.0, 1.0])], [np.array([0.5, 0.4])], 0.9, 0.0)
    assert found.tolist() == pytest.approx([0.9 * 0.4 - 0.5, 1 - 0.4])


def test_a_truncated_answer_has_its_reward_on_its_last_token_and_expects_nothing_behind_it() -> None:
    """Also where it was cut off: no token is added, and no value is taken for what it might have earned."""
    values = [np.array([0.3, 0.7], dtype=np.float32)]
    learned = ppo.advantages(
        answers([1.0], [0], [2], values=values, truncated_A=np.array([True])), ppo.Settings(whiten_advantages=False, gamma=0.5)
    )
    assert learned.returns[0].tolist() == pytest.approx([0.5, 1.0])


def test_whitened_advantages_have_mean_zero_and_variance_one_over_tokens() -> None:
    learned = ppo.advantages(random_answers(), ppo.Settings(lam=0.9))
    tokens = np.concatenate(learned.advantages)
    assert tokens.mean() == pytest.approx(0, abs=1e-6) and tokens.var() == pytest.approx(1, abs=1e-5)
    raw = ppo.advantages(random_answers(), ppo.Settings(lam=0.9, whiten_advantages=False))
    for a, b in zip(learned.returns, raw.returns, strict=True):
        assert np.array_equal(a, b), "what the critic learns is not whitened"


def test_explained_variance_is_one_of_a_perfect_critic_and_zero_of_a_constant() -> None:
    def explained(values: list[float]) -> float:
        given = answers([0.0, 1.0, 2.0], [0, 0, 0], [1, 1, 1], values=[np.array([v], dtype=np.float32) for v in values])
        return ppo.advantages(given, ppo.Settings()).metrics["explained_variance"]

    assert explained([0.0, 1.0, 2.0]) == pytest.approx(1.0)
    assert explained([5.0, 5.0, 5.0]) == pytest.approx(0.0)
    assert explained([2.0, 1.0, 0.0]) == pytest.approx(-3.0)


def test_reinforce_gives_a_token_the_discounted_rewards_from_it_on() -> None:
    assert discounted_sums([np.array([1.0, 2.0, 4.0]), np.array([8.0])], 0.5)[0].tolist() == [3.0, 4.0, 4.0]
    learned = reinforce.advantages(answers([1.0, 3.0], [0, 1], [2, 1]), reinforce.Settings(gamma=0.5, norm_by_std=False))
    baseline = (0.5 + 3.0) / 2
    assert [a.tolist() for a in learned.advantages] == [[0.5 - baseline, 1.0 - baseline], [3.0 - baseline]]


def test_the_divergence_in_the_reward_is_k1_on_each_token() -> None:
    old, ref = [np.log(np.array([0.5, 0.2], dtype=np.float32))], [np.log(np.array([0.25, 0.4], dtype=np.float32))]
    settings = ppo.Settings(kl_coef=0.1, kl_in="reward", whiten_advantages=False)
    given = answers([1.0], [0], [2], old_logprobs=old, ref_logprobs=ref, values=[np.zeros(2, dtype=np.float32)])
    learned = ppo.advantages(given, settings)
    ln2 = float(np.log(2))
    assert learned.returns[0].tolist() == pytest.approx([1.0 - 0.1 * ln2 + 0.1 * ln2, 1.0 + 0.1 * ln2])
    given = answers([1.0, 1.0], [0, 0], [2, 2], old_logprobs=old * 2, ref_logprobs=[ref[0], old[0]])
    of_answer = rloo.Settings(kl_coef=0.1, kl_in="reward")
    given = replace(given, ref_logprobs=[np.log(np.array([0.25, 0.1], dtype=np.float32)), old[0]])
    assert of_answers(rloo.advantages(given, of_answer).advantages) == pytest.approx([-0.2 * ln2, 0.2 * ln2], abs=1e-6)


POLICY, REFERENCE = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64), torch.tensor([0.3, 0.3, 0.4], dtype=torch.float64)
DIVERGENCE = float((POLICY * (POLICY / REFERENCE).log()).sum())


@pytest.mark.parametrize(("estimator", "tolerance"), [("k1", 1e-9), ("k3", 1e-9), ("k2", 0.1)])
def test_k1_and_k3_are_the_divergence_on_average_and_k2_is_near_it(estimator: str, tolerance: float) -> None:
    """Over all tokens of a distribution, each as often as it is drawn."""
    estimates = estimate(POLICY.log(), REFERENCE.log(), estimator)
    assert float((POLICY * estimates).sum()) == pytest.approx(DIVERGENCE, rel=tolerance)
    torch.testing.assert_close(torch.from_numpy(estimate(POLICY.log().numpy(), REFERENCE.log().numpy(), estimator)), estimates)


def gradient_by_logits(of_token: Callable[[Tensor], Tensor]) -> Tensor:
    """The mean over drawn tokens of the gradient of what is made of each one's log-probability."""
    logits = POLICY.log().clone().requires_grad_()
    logprob = logits.log_softmax(-1)
    return torch.autograd.grad((POLICY * of_token(logprob)).sum(), logits)[0]


def exact_gradient() -> Tensor:
    logits = POLICY.log().clone().requires_grad_()
    logprob = logits.log_softmax(-1)
    return torch.autograd.grad((logprob.exp() * (logprob - REFERENCE.log())).sum(), logits)[0]


def test_k2_in_the_loss_and_k1_in_the_reward_have_the_gradient_of_the_divergence() -> None:
    in_loss = gradient_by_logits(lambda logprob: estimate(logprob, REFERENCE.log(), "k2"))
    in_reward = gradient_by_logits(lambda logprob: estimate(logprob.detach(), REFERENCE.log(), "k1") * logprob)
    torch.testing.assert_close(in_loss, exact_gradient())
    torch.testing.assert_close(in_reward, exact_gradient())


def test_k3_in_the_loss_has_the_gradient_of_the_divergence_the_other_way_round_and_k1_none() -> None:
    """Which is near, and zero at the same place: sum of (p - r) * gradient of log p."""
    k3 = gradient_by_logits(lambda logprob: estimate(logprob, REFERENCE.log(), "k3"))
    torch.testing.assert_close(k3, POLICY - REFERENCE)
    assert torch.nn.functional.cosine_similarity(k3, exact_gradient(), dim=0) > 0.95
    k1 = gradient_by_logits(lambda logprob: estimate(logprob, REFERENCE.log(), "k1"))
    assert k1.abs().max() < 1e-12
    with pytest.raises(UserError, match="zero on average"):
        grpo.Settings(kl_coef=0.1, kl_estimator="k1").check()


def test_an_adaptive_weight_follows_its_target() -> None:
    kl = AdaptiveKL(0.1, target=0.05, horizon=1000)
    assert kl.update(0.055, 100) == pytest.approx(0.1 * (1 + 0.1 * 0.1))
    assert kl.update(5.0, 100) == pytest.approx(0.101 * 1.02), "no more than 0.2 at a time"
    assert kl.update(0.0, 100) == pytest.approx(0.101 * 1.02 * 0.98)
    assert AdaptiveKL(0.1, target=0.05, horizon=10).update(0.0, 1000) == pytest.approx(0.1 * 0.8), "it is never negative"


# advantage, ratio, dual clip: the loss, its slope by the log-probability, and whether it is clipped; bounds 0.8 and 1.28
CLIPPED = [
    (1.0, 1.5, None, -1.28, 0.0, True),
    (1.0, 0.5, None, -0.5, -0.5, False),
    (1.0, 1.1, None, -1.1, -1.1, False),
    (-1.0, 0.5, None, 0.8, 0.0, True),
    (-1.0, 1.5, None, 1.5, 1.5, False),
    (-1.0, 4.0, None, 4.0, 4.0, False),
    (-1.0, 4.0, 3.0, 3.0, 0.0, True),
    (-2.0, 2.0, 3.0, 4.0, 4.0, False),
    (1.0, 4.0, 3.0, -1.28, 0.0, True),
]


@pytest.mark.parametrize(("advantage", "ratio", "dual", "expected", "slope", "clipped"), CLIPPED)
def test_ratios_count_within_their_bounds(
    advantage: float, ratio: float, dual: float | None, expected: float, slope: float, clipped: bool
) -> None:
    batch = batch_of([1], advantage=[advantage], old_logprob=[-2.0])
    logprob = torch.tensor([-2.0 + float(np.log(ratio))], requires_grad=True)
    out = dapo.Loss(dapo.Settings(dual_clip=dual), 10).loss(TokenOut(logprob), batch)
    assert out.sum.item() == pytest.approx(expected, rel=1e-5)
    assert float(torch.autograd.grad(out.sum, logprob)[0]) == pytest.approx(slope, rel=1e-5)
    assert bool(out.metric_sums["clip_fraction"]) is clipped
    assert float(out.metric_maxima["largest_ratio"]) == pytest.approx(ratio, rel=1e-5)


# Answers of 1 and 3 tokens with advantages 1 and 2, on policy: the loss of a token is minus its advantage.
@pytest.mark.parametrize(
    ("aggregation", "mean"), [("token-mean", -(1 + 6) / 4), ("sequence-mean", -(1 + 2) / 2), ("constant", -(1 + 6) / (2 * 10))]
)
def test_the_three_ways_to_add_up_tokens(aggregation: str, mean: float) -> None:
    batch = batch_of([1, 3], advantage=[1.0, 2.0, 2.0, 2.0])
    method = ppo.Loss(ppo.Settings(loss_aggregation=aggregation), 10)
    assert float(method.loss(TokenOut(torch.zeros(4)), batch).sum) / method.count(batch) == pytest.approx(mean)


def test_gspo_has_one_ratio_for_an_answer_the_geometric_mean_and_rloo_the_product() -> None:
    batch = batch_of([1, 3], advantage=[1.0, 1.0, 1.0, 1.0], old_logprob=[-1.0] * 4)
    logprob = torch.tensor([-1.1, -1.2, -1.0, -0.5])
    wide = dict(clip_ratio_low=0.9, clip_ratio_high=9.0)
    for method, of_second in ((gspo, np.exp(0.3 / 3)), (rloo, np.exp(0.3))):
        found = float(method.Loss(method.Settings(**wide), 10).loss(TokenOut(logprob), batch).sum)
        assert found == pytest.approx(-np.exp(-0.1) - of_second, rel=1e-5)


@pytest.mark.parametrize("source", ["trainer", "rollout"])
def test_the_rollout_is_compared_with_the_trainer_whoever_says_what_was_before(source: str) -> None:
    batch = batch_of([2], advantage=[1.0] * 2, old_logprob=[-1.0, -1.0], rollout_logprob=[-1.0, -1.0])
    if source == "trainer":
        batch.old_logprob_M = torch.tensor([-1.5, -1.0])
    out = ppo.Loss(ppo.Settings(old_logprobs=source), 10).loss(TokenOut(torch.tensor([-1.5, -1.0])), batch)
    assert float(out.metric_maxima["largest_rollout_difference"]) == pytest.approx(0.5)


@pytest.mark.parametrize(("kind", "weights"), [("truncate", [1.0, 0.4, 1.5, 2.0]), ("mask", [1.0, 0.0, 1.5, 0.0])])
def test_weights_correct_for_a_rollout_of_other_probabilities(kind: str, weights: list[float]) -> None:
    """Old over rollout probability is 1, 0.4, 1.5 and 5; the cap is 2."""
    rollout = [-1.0, -1.0 - float(np.log(0.4)), -1.0 - float(np.log(1.5)), -1.0 - float(np.log(5))]
    batch = batch_of([4], advantage=[1.0] * 4, old_logprob=[-1.0] * 4, rollout_logprob=rollout)
    out = ppo.Loss(ppo.Settings(importance_weights=kind), 10).loss(TokenOut(torch.full((4,), -1.0)), batch)
    assert float(out.sum) == pytest.approx(-sum(weights), rel=1e-5)
    assert float(out.metric_sums["importance_weight"]) == pytest.approx(sum(weights), rel=1e-5)
    assert float(out.metric_maxima["largest_rollout_difference"]) == pytest.approx(np.log(5), rel=1e-5)


def test_divergence_and_entropy_are_parts_of_the_loss_where_asked_for_and_metrics_always() -> None:
    batch = batch_of([2], advantage=[0.0, 0.0], ref_logprob=[-1.0, -1.0])
    out = TokenOut(torch.tensor([-2.0, -1.0]), torch.tensor([0.5, 0.7]))
    plain = ppo.Loss(ppo.Settings(), 10).loss(out, batch)
    assert float(plain.sum) == 0.0
    k3 = float(np.e - 2)
    both = ppo.Loss(ppo.Settings(kl_coef=0.5, entropy_coef=0.1), 10).loss(out, batch)
    assert float(both.sum) == pytest.approx(0.5 * k3 - 0.1 * 1.2, rel=1e-5)
    for result in (plain, both):
        found = {name: float(value) for name, value in result.metric_sums.items()}
        assert found == pytest.approx({"clip_fraction": 0.0, "kl_k1": -1.0, "kl_k3": k3, "entropy": 1.2}, rel=1e-5)


# value, old value, return, clip: the loss
@pytest.mark.parametrize(
    ("value", "old", "target", "clip", "expected"),
    [
        (1.0, 0.0, 2.0, None, 0.5),
        (1.0, 0.0, 2.0, 0.2, 1.8**2 / 2),  # it moved the right way, but counts no further than 0.2
        (0.1, 0.0, 2.0, 0.2, 1.9**2 / 2),
        (-1.0, 0.0, 2.0, 0.2, 4.5),  # the wrong way counts in full
    ],
)
def test_a_value_counts_no_further_than_its_clip(value: float, old: float, target: float, clip: float | None, expected: float) -> None:
    batch = batch_of([1], value=[old], **{"return": [target]})
    out = ppo.ValueLoss(ppo.Settings(value_clip=clip)).loss(ValueOut(torch.tensor([value])), batch)
    assert float(out.sum) == pytest.approx(expected, rel=1e-5)


def test_dpo_prefers_the_chosen_answer_by_its_gain_over_the_reference() -> None:
    """Answers of 1, 2, 1 and 1 tokens in two pairs; beta 0.5; gains 1 and -1 - 1, then 0 and 3."""
    batch = batch_of([1, 2, 1, 1], ref_logprob=[-3.0, -1.0, -1.0, -2.0, -4.0])
    out = dpo.Loss(dpo.Settings(beta=0.5)).loss(TokenOut(torch.tensor([-2.0, -2.0, -2.0, -2.0, -1.0])), batch)
    margins = np.array([0.5 * (1 + 2), 0.5 * (0 - 3)])
    assert float(out.sum) == pytest.approx(np.log1p(np.exp(-margins)).sum(), rel=1e-5)
    assert float(out.count_sums["accuracy"]) == 1.0 and float(out.count_sums["margin"]) == pytest.approx(margins.sum())
    assert dpo.Loss(dpo.Settings()).count(batch) == 2.0 and batch.has_filler
    smoothed = dpo.Loss(dpo.Settings(beta=0.5, label_smoothing=0.1)).loss(TokenOut(torch.tensor([-2.0, -2.0, -2.0, -2.0, -1.0])), batch)
    assert float(smoothed.sum) == pytest.approx((0.9 * np.log1p(np.exp(-margins)) + 0.1 * np.log1p(np.exp(margins))).sum(), rel=1e-5)


def test_a_batch_carries_its_values_to_the_parts_of_several_processes() -> None:
    fields = {name.removesuffix("_M"): np.arange(6.0) + 10 * number for number, name in enumerate(VALUES)}
    batch = batch_of([2, 4], **{name: values.tolist() for name, values in fields.items()})
    parts = [batch.part(number, 2) for number in range(2)]
    for name in VALUES:
        assert torch.cat([getattr(part, name) for part in parts]).equal(getattr(batch, name))
        assert all(len(getattr(part, name)) == len(part.trained_M) for part in parts)
    assert [part.first_token for part in parts] == [0, 16]


def test_values_must_be_as_many_as_trained_tokens() -> None:
    with pytest.raises(AssertionError, match="values for documents"):
        batch_of([2, 3], advantage=[1.0] * 4)
