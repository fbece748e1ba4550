"""DAPO (arXiv:2503.14476): GRPO with a higher upper clip bound, and with new prompts in place of groups with equal rewards."""

from dataclasses import dataclass

from verl.algorithms._advantage import group_advantages
from verl.algorithms._policy import PolicyLoss
from verl.algorithms._settings import GroupSettings
from verl.algorithms.answers import Advantages, Answers

needs_critic, needs_groups = False, True


@dataclass
class Settings(GroupSettings):
    norm_by_std: bool = True
    clip_ratio_high: float = 0.28
    dynamic_sampling: bool = True


def advantages(answers: Answers, settings: Settings) -> Advantages:
    """Same as in GRPO. `dynamic_sampling` excludes groups with equal rewards, and `overlong_buffer_tokens` penalizes overlong answers."""
    return group_advantages(answers, settings)


class Loss(PolicyLoss):
    """Clipped ratios of tokens; each token has the same weight."""
