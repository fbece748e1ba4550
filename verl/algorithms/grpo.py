"""GRPO (DeepSeekMath, arXiv:2402.03300): the baseline is the mean reward of the answers to the same prompt; there is no critic."""

from dataclasses import dataclass

from verl.algorithms._advantage import group_advantages
from verl.algorithms._policy import PolicyLoss
from verl.algorithms._settings import GroupSettings
from verl.algorithms.answers import Advantages, Answers

needs_critic, needs_groups = False, True


@dataclass
class Settings(GroupSettings):
    norm_by_std: bool = True
    loss_aggregation: str = "sequence-mean"


def advantages(answers: Answers, settings: Settings) -> Advantages:
    """Return the reward minus the mean of its group, divided by the group's standard deviation."""
    return group_advantages(answers, settings)


class Loss(PolicyLoss):
    """Clipped ratios of tokens; each answer has the same weight, whatever its length."""
