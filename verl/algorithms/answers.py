"""What a method sees of a batch of answers, and what it makes of it. Host memory, numpy.

Dimensions: A answers of this rank; the groups of a prompt's answers are whole on a rank.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Answers:
    """Answers with their rewards. A list holds an array for each answer, with one float32 value for each trained token.

    Attributes:
        reward_A: float32.
        group_A: number of the prompt, int.
        lengths_A: trained tokens of each answer, int; 0 of an empty answer, which has nothing to learn, but with which others are compared.
        truncated_A: whether the answer was cut off at the limit, bool.
        max_new_tokens: that limit.
        old_logprobs: log-probabilities under the policy before the update.
        ref_logprobs: under the reference model.
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
    """What the update is to learn of a batch of answers.

    Attributes:
        advantages: an array for each answer, with one float32 value for each trained token.
        returns: likewise what the critic is to learn; None without a critic.
        metrics: means over all ranks.
    """

    advantages: list[np.ndarray]
    returns: list[np.ndarray] | None
    metrics: dict[str, float]
