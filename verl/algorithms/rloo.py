"""RLOO (arXiv:2402.14740): REINFORCE, the baseline of an answer being the mean of the others to its prompt."""

from verl.algorithms._advantage import group_advantages
from verl.algorithms._policy import PolicyLoss
from verl.algorithms._settings import COMMON, filled
from verl.algorithms.answers import Advantages, Answers
from verl.config.ppo import AlgorithmConfig

needs_critic, needs_groups = False, True
DEFAULTS: dict[str, object] = {**COMMON, "loss_aggregation": "sequence-mean"}


def advantages(answers: Answers, settings: AlgorithmConfig) -> Advantages:
    """The reward less the mean of the others in its group."""
    return group_advantages(answers, filled(settings, DEFAULTS), leave_one_out=True)


class Loss(PolicyLoss):
    """Clipped ratios of whole answers, that is of the products over their tokens; each answer counts the same."""

    def __init__(self, settings: AlgorithmConfig, max_new_tokens: int):
        super().__init__(settings, max_new_tokens, DEFAULTS, ratio="answer")
