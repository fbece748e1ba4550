"""GSPO (arXiv:2507.18071): GRPO with one ratio for an answer, the geometric mean of its tokens'."""

from verl.algorithms._advantage import group_advantages
from verl.algorithms._policy import PolicyLoss
from verl.algorithms._settings import COMMON, filled
from verl.algorithms.answers import Advantages, Answers
from verl.config.ppo import AlgorithmConfig

needs_critic, needs_groups = False, True
DEFAULTS: dict[str, object] = {
    **COMMON,
    "norm_by_std": True,
    "loss_aggregation": "sequence-mean",
    "clip_ratio_low": 3e-4,
    "clip_ratio_high": 4e-4,
}


def advantages(answers: Answers, settings: AlgorithmConfig) -> Advantages:
    """As GRPO."""
    return group_advantages(answers, filled(settings, DEFAULTS))


class Loss(PolicyLoss):
    """Clipped ratios of answers; each answer counts the same."""

    def __init__(self, settings: AlgorithmConfig, max_new_tokens: int):
        super().__init__(settings, max_new_tokens, DEFAULTS, ratio="mean of answer")
