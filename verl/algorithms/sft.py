"""Supervised fine-tuning: the negative log-likelihood of the answers' tokens.

Dimensions: M trained positions.
"""

from verl.data.batch import Batch
from verl.engine.engine import LossOut
from verl.engine.logprobs import TokenOut


def loss(out: TokenOut, batch: Batch) -> LossOut:
    """The sum of -log p(token) over the trained tokens, in nats; the engine divides it by their number over all ranks."""
    total = -out.logprob_M.sum()
    return LossOut(total, {"loss": total.detach()})
