"""Supervised fine-tuning: the negative log-likelihood of the answers' tokens.

Dimensions: M trained positions.
"""

import torch
from torch import Tensor

from verl.data.batch import Batch
from verl.engine.contract import LossOut, TokenOut


def loss(out: TokenOut, batch: Batch) -> LossOut:
    """Sum -log p(token) over the trained tokens, in nats. The engine divides by their number over all ranks."""
    return LossOut(-out.logprob_M.sum(), {})


def slope(batch: Batch) -> Tensor:
    """Return the derivative of the sum by each log-probability, slope_M in float32. It is known before the forward pass."""
    return torch.full((len(batch.trained_M),), -1.0, device=batch.trained_M.device)
