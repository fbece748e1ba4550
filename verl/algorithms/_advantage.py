"""Compute advantages from rewards: reward deductions, group baselines, GAE and whitening.

Computed in float64; results are float32.

Dimensions: A answers on this rank; L tokens of the longest.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from verl import dist
from verl.algorithms._kl import estimate
from verl.algorithms._settings import GroupSettings, PolicySettings
from verl.algorithms.answers import Advantages, Answers
from verl.errors import UserError

LEAST_STD = 1e-4  # added to the standard deviation of rewards
LEAST_VARIANCE = 1e-8  # added to the variance of advantages


def shaped_rewards(answers: Answers, settings: PolicySettings) -> np.ndarray:
    """Return the rewards minus the penalty for overlong answers, reward_A.

    The penalty starts `overlong_buffer_tokens` before the limit and rises linearly to `overlong_penalty` at the limit. A truncated answer
    gets the full penalty (DAPO, arXiv:2503.14476).
    """
    reward_A = answers.reward_A.astype(np.float64)
    if settings.overlong_buffer_tokens == 0:
        return reward_A
    into_buffer_A = answers.lengths_A - (answers.max_new_tokens - settings.overlong_buffer_tokens)
    share_A = np.clip(into_buffer_A / settings.overlong_buffer_tokens, 0.0, 1.0)
    return reward_A - settings.overlong_penalty * np.where(answers.truncated_A, 1.0, share_A)


def kl_deductions(answers: Answers, settings: PolicySettings) -> list[np.ndarray] | None:
    """Return the KL penalty of each token if the penalty is part of the reward, else None."""
    if settings.kl_coef == 0 or settings.kl_in != "reward":
        return None
    assert answers.old_logprobs is not None and answers.ref_logprobs is not None
    pairs = zip(answers.old_logprobs, answers.ref_logprobs, strict=True)
    return [settings.kl_coef * estimate(old.astype(np.float64), ref.astype(np.float64), settings.estimator) for old, ref in pairs]


def token_rewards(answers: Answers, settings: PolicySettings) -> list[np.ndarray]:
    """Return each token's reward: minus the KL penalty, plus the answer's reward at its last token, also if the answer is truncated."""
    rewards = [np.zeros(length) for length in answers.lengths_A]
    for tokens, reward in zip(rewards, shaped_rewards(answers, settings), strict=True):
        tokens[-1:] = reward  # changes nothing if the answer is empty
    deductions = kl_deductions(answers, settings)
    return rewards if deductions is None else [tokens - lost for tokens, lost in zip(rewards, deductions, strict=True)]


def answer_rewards(answers: Answers, settings: PolicySettings) -> np.ndarray:
    """Return each answer's reward minus the KL penalties of its tokens, reward_A."""
    reward_A, deductions = shaped_rewards(answers, settings), kl_deductions(answers, settings)
    return reward_A if deductions is None else reward_A - np.array([lost.sum() for lost in deductions])


def group_advantages(answers: Answers, settings: GroupSettings, *, leave_one_out: bool = False) -> Advantages:
    """Return advantages that are equal for all tokens of an answer: its reward minus the mean reward of its group.

    Args:
        settings: `norm_by_std` divides by the group's standard deviation (with n - 1).
        leave_one_out: use the mean of the *other* answers in the group.
    Raises:
        UserError: a group has only one answer.
    """
    reward_A = answer_rewards(answers, settings)
    number_A, size_A, mean_A, std_A = _groups(reward_A, answers.group_A)
    dist.together(lambda: _check_sizes(size_A))
    advantage_A = reward_A - mean_A
    if leave_one_out:
        advantage_A = advantage_A * size_A / (size_A - 1)
    if settings.norm_by_std:
        advantage_A = advantage_A / (std_A + LEAST_STD)
    has_spread_A = _has_spread(answers.reward_A, number_A)
    metrics = means({"groups_without_spread": (1 / size_A)[~has_spread_A]}, over=(1 / size_A).sum())
    return finished(answers, settings, of_tokens(advantage_A, answers), metrics=metrics)


def _check_sizes(size_A: np.ndarray) -> None:
    if (size_A < 2).any():
        fix = "set it to at least 2, or algorithm.name=reinforce"
        raise UserError("an answer is alone in its group, with no other to compare it with", where="rollout.samples_per_prompt", fix=fix)


def _groups(reward_A: np.ndarray, group_A: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return the index of each answer's group, counted from 0, and the group's size, mean and standard deviation."""
    _, number_A, size = np.unique(group_A, return_inverse=True, return_counts=True)
    mean = np.bincount(number_A, reward_A, len(size)) / size
    squares = np.bincount(number_A, (reward_A - mean[number_A]) ** 2, len(size))
    std = np.sqrt(squares / np.maximum(size - 1, 1))
    return number_A, size[number_A], mean[number_A], std[number_A]


def _has_spread(reward_A: np.ndarray, number_A: np.ndarray) -> np.ndarray:
    """Return whether the rewards in each answer's group differ, before any deduction."""
    groups = int(number_A.max(initial=-1)) + 1
    low, high = np.full(groups, np.inf), np.full(groups, -np.inf)
    np.minimum.at(low, number_A, reward_A)
    np.maximum.at(high, number_A, reward_A)
    differs_A: np.ndarray = (high > low)[number_A]
    return differs_A


def discounted_sums(rewards: Sequence[np.ndarray], discount: float) -> list[np.ndarray]:
    """Return for each token the discounted sum of the rewards from this token to the end of the answer."""
    if not rewards:
        return []
    rewards_AL = np.zeros((len(rewards), max(map(len, rewards))))
    for row, tokens in zip(rewards_AL, rewards, strict=True):
        row[: len(tokens)] = tokens
    sums_AL, following_A = np.zeros_like(rewards_AL), np.zeros(len(rewards))
    for place in reversed(range(rewards_AL.shape[1])):
        following_A = sums_AL[:, place] = rewards_AL[:, place] + discount * following_A
    return [row[: len(tokens)] for row, tokens in zip(sums_AL, rewards, strict=True)]


def generalized_advantages(rewards: Sequence[np.ndarray], values: Sequence[np.ndarray], gamma: float, lam: float) -> list[np.ndarray]:
    """GAE (arXiv:1506.02438). The value after the last token is 0, also if the answer is truncated."""
    td_errors = [
        tokens + gamma * np.append(value[1:], 0.0) - value
        for tokens, value in zip(rewards, (v.astype(np.float64) for v in values), strict=True)
    ]
    return discounted_sums(td_errors, gamma * lam)


def of_tokens(value_A: np.ndarray, answers: Answers) -> list[np.ndarray]:
    """Repeat each answer's value for each of its tokens."""
    return [np.full(length, value) for value, length in zip(value_A, answers.lengths_A, strict=True)]


def finished(
    answers: Answers,
    settings: PolicySettings,
    advantages: list[np.ndarray],
    *,
    returns: list[np.ndarray] | None = None,
    metrics: Mapping[str, float] | None = None,
) -> Advantages:
    """Whiten the advantages if `whiten_advantages` is set, convert them to float32, and add the metrics that all methods share."""
    metrics = dict(metrics or {})
    deductions = kl_deductions(answers, settings)
    if deductions is not None:
        metrics |= means({"kl_deduction": _joined(deductions)}, over=float(answers.lengths_A.sum()))
    if settings.overlong_buffer_tokens > 0:
        lost_A = answers.reward_A - shaped_rewards(answers, settings)
        metrics |= means({"overlong_deduction": lost_A}, over=len(lost_A))
    if settings.whiten_advantages:
        advantages = whitened(advantages)
    return Advantages(_float32(advantages), None if returns is None else _float32(returns), metrics)


def whitened(advantages: list[np.ndarray]) -> list[np.ndarray]:
    """Shift and scale to mean 0 and variance 1 over the tokens of all ranks."""
    mean, variance = moments(_joined(advantages))
    return [(tokens - mean) / np.sqrt(variance + LEAST_VARIANCE) for tokens in advantages]


def moments(values: np.ndarray) -> tuple[float, float]:
    """Return mean and variance over all ranks, 0 and 0 if there are no values. Two passes: one pass loses precision for large values."""
    (count, total) = dist.total([len(values), values.sum()])
    mean = total / max(count, 1.0)
    (squares,) = dist.total([((values - mean) ** 2).sum()])
    return mean, squares / max(count, 1.0)


def means(values: Mapping[str, np.ndarray], *, over: float) -> dict[str, float]:
    """Return sums over all ranks, divided by the sum of `over` over all ranks."""
    *sums, count = dist.total([*(float(value.sum()) for value in values.values()), float(over)])
    return {name: total / max(count, 1.0) for name, total in zip(values, sums, strict=True)}


def _joined(arrays: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0), *arrays])


def _float32(arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    return [array.astype(np.float32) for array in arrays]
