"""PPO (arXiv:1707.06347) for language models: a critic predicts the return at each token.

Dimensions: M trained positions.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from verl.algorithms._advantage import finished, generalized_advantages, moments, token_rewards
from verl.algorithms._policy import PolicyLoss
from verl.algorithms._settings import PolicySettings
from verl.algorithms.answers import Advantages, Answers
from verl.data.batch import Batch
from verl.engine.contract import LossOut, ValueOut
from verl.errors import at_least, is_share

needs_critic, needs_groups = True, False


@dataclass
class Settings(PolicySettings):
    whiten_advantages: bool = True
    # Discount factor of rewards, per token.
    gamma: float = 1.0
    # GAE λ, from 0 (one-token TD error) to 1 (return to the end of the answer minus the value).
    lam: float = 1.0
    # Clip range of the critic's loss: new values are clipped to ± this around the old ones; null: no clipping.
    value_clip: float | None = 0.2

    def check(self) -> None:
        super().check()
        is_share("gamma", self.gamma)
        is_share("lam", self.lam)
        at_least("value_clip", self.value_clip, 0.0)


def advantages(answers: Answers, settings: Settings) -> Advantages:
    """GAE with the critic's values, whitened over all ranks. Returns are the advantages before whitening plus the values.

    Metrics: `explained_variance`, the share of the returns' variance that the values explain, and the means `value` and `return`.
    """
    assert answers.values is not None
    raw = generalized_advantages(token_rewards(answers, settings), answers.values, settings.gamma, settings.lam)
    returns = [tokens + value for tokens, value in zip(raw, answers.values, strict=True)]
    return finished(answers, settings, raw, returns=returns, metrics=_value_metrics(returns, answers.values))


def _value_metrics(returns: list[np.ndarray], values: list[np.ndarray]) -> dict[str, float]:
    returned, valued = (np.concatenate([np.zeros(0), *arrays]) for arrays in (returns, values))
    mean, variance = moments(returned)
    value, _ = moments(valued)
    _, left = moments(returned - valued)
    return {"explained_variance": 1 - left / variance if variance > 0 else 0.0, "value": value, "return": mean}


class Loss(PolicyLoss):
    """Clipped ratios of tokens; each token has the same weight."""


class ValueLoss:
    """Compute the critic's loss, with a ValueScorer: half the squared error to the returns.

    With `value_clip` it is the larger of the errors of the value and of the value clipped around the old one: a value gains nothing by
    moving further than that.
    """

    def __init__(self, settings: Settings):
        self._clip = settings.value_clip

    def loss(self, out: ValueOut, batch: Batch) -> LossOut:
        """Metrics: `value_clip_fraction`."""
        assert batch.value_M is not None and batch.return_M is not None
        square_M = (out.value_M - batch.return_M).square()
        if self._clip is None:
            return LossOut(square_M.sum() / 2, {})
        bounded_M = batch.value_M + (out.value_M - batch.value_M).clamp(-self._clip, self._clip)
        bounded_square_M = (bounded_M - batch.return_M).square()
        is_clipped_M = bounded_square_M > square_M
        return LossOut(torch.maximum(square_M, bounded_square_M).sum() / 2, {"value_clip_fraction": is_clipped_M.float().sum()})

    def slope(self, batch: Batch) -> Tensor | None:
        return None
