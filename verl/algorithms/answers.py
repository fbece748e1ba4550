"""Input and output of a method's `advantages`: answers with rewards, and their advantages. numpy arrays in host memory.

Dimensions: A answers on this rank. All answers to a prompt, its group, are on the same rank.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Answers:
    """Answers with their rewards. Each list holds one float32 array per answer, with one value per trained token.

    Attributes:
        reward_A: float32.
        group_A: number of the answer's prompt, int.
        lengths_A: number of trained tokens, int. It is 0 for an empty answer, which is not trained but counts in the baseline.
        truncated_A: whether the answer was cut off at the length limit, bool.
        max_new_tokens: the length limit.
        old_logprobs: log-probabilities under the policy before the update.
        ref_logprobs: log-probabilities under the reference model.
        values: the critic's value before each token.
    """

    reward_A: np.ndarray
    group_A: np.ndarray
    lengths_A: np.ndarray
    truncated_A: np.ndarray
    max_new_tokens: int
    old_logprobs: list[np.ndarray] | None = None
    ref_logprobs: list[np.ndarray] | None = None
    values: list[np.ndarray] | None = None


@dataclass(frozen=True)
class Advantages:
    """Training targets of a batch of answers.

    Attributes:
        advantages: one float32 array per answer, with one value per trained token; for the actor.
        returns: the same for the critic; None without a critic.
        metrics: means over all ranks.
    """

    advantages: list[np.ndarray]
    returns: list[np.ndarray] | None
    metrics: dict[str, float]
