"""KL divergence of the policy from the reference: estimators on sampled tokens, and an adaptive KL coefficient.

http://joschu.net/blog/kl-approx.html, with r = p_reference / p_policy of a token sampled from the policy:
k1 = -log r and k3 = r - 1 - log r are unbiased, k2 = (log r)^2 / 2 nearly so; k2 and k3 are never negative.
In the loss, the expected gradient of k2 is that of the KL, that of k3 nearly so, and that of k1 is zero. In the reward, k1 gives the
gradient of the KL.
"""

from typing import Any, TypeVar

import numpy as np
import torch

Values = TypeVar("Values", torch.Tensor, np.ndarray)

LARGEST_ERROR = 0.2  # the relative error of the KL is clipped to ± this in each step


def estimate(logprob: Values, ref_logprob: Values, estimator: str) -> Values:
    """Estimate the KL at each token, in nats.

    Args:
        estimator: "k1", "k2" or "k3".
    """
    log_ratio = ref_logprob - logprob
    kl: Values
    if estimator == "k1":
        kl = -log_ratio
    elif estimator == "k2":
        kl = log_ratio * log_ratio / 2
    else:
        exp: Any = torch.exp if isinstance(log_ratio, torch.Tensor) else np.exp
        kl = exp(log_ratio) - 1 - log_ratio
    return kl


class AdaptiveKL:
    """A KL coefficient that rises while the KL is above its target and falls while it is below.

    Ziegler et al., Fine-Tuning Language Models from Human Preferences, 2019, section 2.2.

    Attributes:
        coef: the current coefficient.
    """

    def __init__(self, coef: float, target: float, horizon: int):
        """
        Args:
            target: mean KL to aim for, in nats per token.
            horizon: number of answers over which the coefficient adapts; a step with more answers counts as this many.
        """
        self.coef, self.target, self.horizon = coef, target, horizon

    def update(self, kl: float, answers: int) -> float:
        """Adapt the coefficient to a step's mean KL over `answers` answers of all ranks, and return it."""
        error = min(max(kl / self.target - 1, -LARGEST_ERROR), LARGEST_ERROR)
        self.coef *= 1 + error * min(1.0, answers / self.horizon)  # uncapped, a step of more than five horizons could make it negative
        return self.coef
