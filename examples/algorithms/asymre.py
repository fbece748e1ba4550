"""A method of your own with a key of its own: AsymRE (arXiv:2506.20520).

    verl ppo … algorithm.name=examples/algorithms/asymre.py algorithm.baseline_shift=-0.2

The baseline is V + baseline_shift, where V is the mean reward of the group. A negative shift gives good answers more weight than bad ones.
This helps if the answers come from older weights, as in the later of several updates per step.

A method is a module with `advantages(answers, settings)` and `Loss(settings, max_new_tokens)`, see verl/rl/method.py. This one reuses the
keys and the clipped loss of the built-in methods, and adds one key as a field of `Settings`.
"""

from dataclasses import dataclass, replace

from verl.algorithms._advantage import group_advantages
from verl.algorithms._policy import PolicyLoss
from verl.algorithms._settings import GroupSettings
from verl.algorithms.answers import Advantages, Answers

needs_groups = True


@dataclass
class Settings(GroupSettings):
    # Added to the mean reward of a group to form the baseline (δV in the paper).
    baseline_shift: float = -0.1

    def check(self) -> None:
        super().check()
        if not -100 < self.baseline_shift < 100:
            raise ValueError(f"baseline_shift={self.baseline_shift} is far from any reward")


def advantages(answers: Answers, settings: Settings) -> Advantages:
    """Return the reward minus the shifted mean of its group: r - (V + δV)."""
    learned = group_advantages(answers, settings)
    return replace(learned, advantages=[tokens - settings.baseline_shift for tokens in learned.advantages])


class Loss(PolicyLoss):
    """The clipped loss with a ratio per token; each token has the same weight."""
