"""Supervised fine-tuning: the negative log-likelihood of the answers' tokens.

Dimensions: M trained positions.
"""

import torch
from torch import Tensor

from verl.data.batch import Batch
from verl.engine.contract import LossOut, TokenOut


def loss(out: TokenOut, batch: Batch) -> LossOut:
    """The sum of -log p(token) over the trained tokens, in nats; the engine divides it by their number over all ranks."""
    return LossOut(-out.logprob_M.sum(), {})


def slope(batch: Batch) -> Tensor:
    """Derivative of that sum by each log-probability, slope_M in float32: known before the model has run."""
    return torch.full((len(batch.trained_M),), -1.0, device=batch.trained_M.device)
