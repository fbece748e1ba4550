"""REINFORCE with a baseline: an answer is compared with all answers of the step, whatever their prompt."""

from dataclasses import dataclass

import numpy as np

from verl.algorithms._advantage import LEAST_STD, discounted_sums, finished, moments, shaped_rewards, token_rewards
from verl.algorithms._policy import PolicyLoss
from verl.algorithms._settings import PolicySettings
from verl.algorithms.answers import Advantages, Answers
from verl.config.values import is_share

needs_critic, needs_groups = False, False


@dataclass
class Settings(PolicySettings):
    # Divide the advantages by the standard deviation of the rewards that they are compared with.
    norm_by_std: bool = True
    # Discount of a reward for each token that it lies ahead.
    gamma: float = 1.0

    def check(self) -> None:
        super().check()
        is_share("gamma", self.gamma)


def advantages(answers: Answers, settings: Settings) -> Advantages:
    """The rewards from a token to the end of its answer, less the mean of the answers' over all ranks.

    With `norm_by_std` they are divided by the standard deviation of the answers'.
    """
    sums = discounted_sums(token_rewards(answers, settings), settings.gamma)
    earned = zip(sums, shaped_rewards(answers, settings), strict=True)
    baseline, variance = moments(np.array([tokens[0] if len(tokens) else reward for tokens, reward in earned]))
    scale = np.sqrt(variance) + LEAST_STD if settings.norm_by_std else 1.0
    return finished(answers, settings, [(tokens - baseline) / scale for tokens in sums])


class Loss(PolicyLoss):
    """Clipped ratios of tokens, all of them 1 where there is one update a step; each token counts the same."""
