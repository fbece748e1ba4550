"""GSPO (arXiv:2507.18071): GRPO with one ratio per answer, the geometric mean of its tokens' ratios."""

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
    clip_ratio_low: float = 3e-4
    clip_ratio_high: float = 4e-4


def advantages(answers: Answers, settings: Settings) -> Advantages:
    """Same as in GRPO."""
    return group_advantages(answers, settings)


class Loss(PolicyLoss):
    """Clipped ratios of answers; each answer has the same weight."""

    ratio = "mean of answer"
