"""DAPO (arXiv:2503.14476): GRPO whose ratios may rise further than fall, and that learns from groups with spread alone."""

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
    """As GRPO; groups whose answers all earned the same are left out, and overlong answers lose what `overlong_buffer_tokens` says."""
    return group_advantages(answers, settings)


class Loss(PolicyLoss):
    """Clipped ratios of tokens; each token counts the same."""
