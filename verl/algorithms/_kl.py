"""The KL divergence of the policy from the reference: estimates from the drawn tokens, and the controller of its weight.

http://joschu.net/blog/kl-approx.html, with r = p_reference / p_policy of a token that the policy drew:
k1 = -log r and k3 = r - 1 - log r are right on average, k2 = (log r)^2 / 2 nearly so, and k2 and k3 are never negative.
As a loss, k2 has the gradient of the divergence on average, k3 nearly, and k1 none. As a part of the reward, k1 has it.
"""

from typing import Any, TypeVar

import numpy as np
import torch

Values = TypeVar("Values", torch.Tensor, np.ndarray)

LARGEST_ERROR = 0.2  # of the divergence, relative to its target, that one step answers to


def estimate(logprob: Values, ref_logprob: Values, estimator: str) -> Values:
    """The divergence at each token, in nats.

    Args:
        estimator: "k1", "k2" or "k3".
    """
    log_ratio = ref_logprob - logprob
    divergence: Values
    if estimator == "k1":
        divergence = -log_ratio
    elif estimator == "k2":
        divergence = log_ratio * log_ratio / 2
    else:
        exp: Any = torch.exp if isinstance(log_ratio, torch.Tensor) else np.exp
        divergence = exp(log_ratio) - 1 - log_ratio
    return divergence


class AdaptiveKL:
    """A weight of the divergence that grows while the divergence is above its target, and falls while it is below.

    Ziegler et al., Fine-Tuning Language Models from Human Preferences, 2019, section 2.2.

    Attributes:
        coef: the weight now.
    """

    def __init__(self, coef: float, target: float, horizon: int):
        """
        Args:
            target: of the mean divergence, in nats a token.
            horizon: answers over which the weight follows; of more of them in one step, it follows as if of so many.
        """
        self.coef, self.target, self.horizon = coef, target, horizon

    def update(self, divergence: float, answers: int) -> float:
        """Take in a step's mean divergence over so many answers (of all ranks), and return the new weight."""
        error = min(max(divergence / self.target - 1, -LARGEST_ERROR), LARGEST_ERROR)
        self.coef *= 1 + error * min(1.0, answers / self.horizon)  # or five horizons in a step could make it negative
        return self.coef
