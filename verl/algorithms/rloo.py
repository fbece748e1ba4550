"""RLOO (arXiv:2402.14740): REINFORCE with a baseline, the mean reward of the other answers to the prompt."""

from dataclasses import dataclass

from verl.algorithms._advantage import group_advantages
from verl.algorithms._policy import PolicyLoss
from verl.algorithms._settings import GroupSettings
from verl.algorithms.answers import Advantages, Answers

needs_critic, needs_groups = False, True


@dataclass
class Settings(GroupSettings):
    loss_aggregation: str = "sequence-mean"


def advantages(answers: Answers, settings: Settings) -> Advantages:
    """Return the reward minus the mean of the other answers in its group."""
    return group_advantages(answers, settings, leave_one_out=True)


class Loss(PolicyLoss):
    """Clipped ratios of whole answers, the products of their tokens' ratios; each answer has the same weight."""

    ratio = "answer"
