"""RLOO (arXiv:2402.14740): REINFORCE, the baseline of an answer being the mean of the others to its prompt."""

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
    """The reward less the mean of the others in its group."""
    return group_advantages(answers, settings, leave_one_out=True)


class Loss(PolicyLoss):
    """Clipped ratios of whole answers, that is of the products over their tokens; each answer counts the same."""

    ratio = "answer"
