"""Dr. GRPO (arXiv:2503.20783): GRPO without dividing by the length, which favours long wrong answers, or by the standard deviation,
which favours questions whose rewards differ little.
"""

from dataclasses import dataclass

from verl.algorithms._advantage import group_advantages
from verl.algorithms._policy import PolicyLoss
from verl.algorithms._settings import GroupSettings
from verl.algorithms.answers import Advantages, Answers

needs_critic, needs_groups = False, True


@dataclass
class Settings(GroupSettings):
    loss_aggregation: str = "constant"


def advantages(answers: Answers, settings: Settings) -> Advantages:
    """Return the reward minus the mean of its group."""
    return group_advantages(answers, settings)


class Loss(PolicyLoss):
    """Clipped ratios of tokens; each token has the same weight."""
