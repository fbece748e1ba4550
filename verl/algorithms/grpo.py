"""GRPO (DeepSeekMath, arXiv:2402.03300): an answer is compared with the others to its prompt; there is no critic."""

from verl.algorithms._advantage import group_advantages
from verl.algorithms._policy import PolicyLoss
from verl.algorithms._settings import COMMON, filled
from verl.algorithms.answers import Advantages, Answers
from verl.config.ppo import AlgorithmConfig

needs_critic, needs_groups = False, True
DEFAULTS: dict[str, object] = {**COMMON, "norm_by_std": True, "loss_aggregation": "sequence-mean"}


def advantages(answers: Answers, settings: AlgorithmConfig) -> Advantages:
    """The reward less the mean of its group, divided by the group's standard deviation."""
    return group_advantages(answers, filled(settings, DEFAULTS))


class Loss(PolicyLoss):
    """Clipped ratios of tokens; each answer counts the same, however long."""

    def __init__(self, settings: AlgorithmConfig, max_new_tokens: int):
        super().__init__(settings, max_new_tokens, DEFAULTS)
