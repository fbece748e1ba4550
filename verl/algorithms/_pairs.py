"""Losses of pairs: document 2k is a chosen answer, 2k + 1 the rejected one. Filler comes last.

Dimensions: M trained positions; S documents; P pairs.
"""

import torch
from torch import Tensor

from verl.algorithms._documents import sum_by_document
from verl.data.batch import Batch
from verl.engine.contract import LossOut, TokenOut


def pairs(values_S: Tensor) -> tuple[Tensor, Tensor]:
    """Split values of documents in pairs into those of the chosen and of the rejected answers, without filler."""
    values_P2 = values_S[: len(values_S) // 2 * 2].view(-1, 2)
    return values_P2[:, 0], values_P2[:, 1]


def count_pairs(batch: Batch) -> float:
    """Return the number of pairs in a batch, divided by the number of processes that share the batch."""
    assert batch.documents % 2 == 0, f"{batch.documents} documents do not form pairs"
    return batch.documents / 2 / batch.parts


def log_ratios(out: TokenOut, batch: Batch) -> Tensor:
    """Return the log-ratio of policy to reference of each document, log_ratio_S. The batch must have the reference's log-probabilities."""
    assert batch.ref_logprob_M is not None
    return sum_by_document(out.logprob_M - batch.ref_logprob_M, batch)


def of_pairs(loss_P: Tensor, reward_S: Tensor, out: TokenOut, batch: Batch, **more_P: Tensor) -> LossOut:
    """Return the sum of a loss over pairs, with its metrics as means over pairs.

    Metrics: `chosen_reward` and `rejected_reward`, the method's rewards of the answers; `margin`, their difference; `accuracy`, the share
    of pairs with a positive one; `chosen_logprob` and `rejected_logprob`, the answers' log-probabilities; and `more_P`.
    """
    with torch.no_grad():
        chosen_P, rejected_P = pairs(reward_S)
        chosen_logprob_P, rejected_logprob_P = pairs(sum_by_document(out.logprob_M, batch))
        metrics = {
            "accuracy": (chosen_P - rejected_P > 0).float(),
            "margin": chosen_P - rejected_P,
            "chosen_reward": chosen_P,
            "rejected_reward": rejected_P,
            "chosen_logprob": chosen_logprob_P,
            "rejected_logprob": rejected_logprob_P,
            **more_P,
        }
        sums = {name: values_P.sum() / batch.parts for name, values_P in metrics.items()}
    return LossOut(loss_P.sum() / batch.parts, {}, sums)
