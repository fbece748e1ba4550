"""REINFORCE with a baseline: the mean reward of all answers of the step, whatever their prompt."""

from dataclasses import dataclass

import numpy as np

from verl.algorithms._advantage import LEAST_STD, discounted_sums, finished, moments, shaped_rewards, token_rewards
from verl.algorithms._policy import PolicyLoss
from verl.algorithms._settings import PolicySettings
from verl.algorithms.answers import Advantages, Answers
from verl.errors import is_share

needs_critic, needs_groups = False, False


@dataclass
class Settings(PolicySettings):
    # Divide the advantages by the standard deviation of the rewards of the step.
    norm_by_std: bool = True
    # Discount factor of rewards, per token.
    gamma: float = 1.0

    def check(self) -> None:
        super().check()
        is_share("gamma", self.gamma)


def advantages(answers: Answers, settings: Settings) -> Advantages:
    """Return the discounted rewards from a token to the end of its answer, minus the mean over the answers of all ranks.

    With `norm_by_std` they are divided by the standard deviation over the answers.
    """
    sums = discounted_sums(token_rewards(answers, settings), settings.gamma)
    with_reward = zip(sums, shaped_rewards(answers, settings), strict=True)
    baseline, variance = moments(np.array([tokens[0] if len(tokens) else reward for tokens, reward in with_reward]))
    scale = np.sqrt(variance) + LEAST_STD if settings.norm_by_std else 1.0
    return finished(answers, settings, [(tokens - baseline) / scale for tokens in sums])


class Loss(PolicyLoss):
    """Clipped ratios of tokens, which are all 1 with one update per step; each token has the same weight."""
