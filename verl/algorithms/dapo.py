"""DAPO (arXiv:2503.14476): GRPO whose ratios may rise further than fall, and that learns from groups with spread alone."""

from verl.algorithms._advantage import group_advantages
from verl.algorithms._policy import PolicyLoss
from verl.algorithms._settings import COMMON, filled
from verl.algorithms.answers import Advantages, Answers
from verl.config.ppo import AlgorithmConfig

needs_critic, needs_groups = False, True
DEFAULTS: dict[str, object] = {**COMMON, "norm_by_std": True, "clip_ratio_high": 0.28, "dynamic_sampling": True}


def advantages(answers: Answers, settings: AlgorithmConfig) -> Advantages:
    """As GRPO; groups whose answers all earned the same are left out, and overlong answers lose what `overlong_buffer_tokens` says."""
    return group_advantages(answers, filled(settings, DEFAULTS))


class Loss(PolicyLoss):
    """Clipped ratios of tokens; each token counts the same."""

    def __init__(self, settings: AlgorithmConfig, max_new_tokens: int):
        super().__init__(settings, max_new_tokens, DEFAULTS)
