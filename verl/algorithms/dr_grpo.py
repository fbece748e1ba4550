"""Dr. GRPO (arXiv:2503.20783): GRPO without its two divisions, which favour long wrong answers and questions of even difficulty."""

from verl.algorithms._advantage import group_advantages
from verl.algorithms._policy import PolicyLoss
from verl.algorithms._settings import COMMON, filled
from verl.algorithms.answers import Advantages, Answers
from verl.config.ppo import AlgorithmConfig

needs_critic, needs_groups = False, True
DEFAULTS: dict[str, object] = {**COMMON, "loss_aggregation": "constant"}


def advantages(answers: Answers, settings: AlgorithmConfig) -> Advantages:
    """The reward less the mean of its group."""
    return group_advantages(answers, filled(settings, DEFAULTS))


class Loss(PolicyLoss):
    """Clipped ratios of tokens; each token counts the same."""

    def __init__(self, settings: AlgorithmConfig, max_new_tokens: int):
        super().__init__(settings, max_new_tokens, DEFAULTS)
