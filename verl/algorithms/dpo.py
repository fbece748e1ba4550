"""DPO (arXiv:2305.18290): raise the log-ratio of policy to reference for the chosen answer above that for the rejected one.

Documents are pairs: document 2k is a chosen answer, 2k + 1 the rejected one. Filler comes last.

Dimensions: M trained positions; S documents; P pairs.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from verl.algorithms._documents import sum_by_document
from verl.data.batch import Batch
from verl.engine.contract import LossOut, TokenOut
from verl.errors import UserError

needs_reference, scorer, trains = True, "token_logprobs", "a policy by DPO"


@dataclass
class Settings:
    # Scale of the implicit reward: the larger, the closer the policy stays to the reference, the model that the run starts from.
    beta: float = 0.1
    # Assumed share of pairs with swapped labels (conservative DPO; arXiv:2305.18290, appendix).
    label_smoothing: float = 0.0

    def check(self) -> None:
        """Raises UserError naming the key."""
        if not 0.0 < self.beta < float("inf"):
            raise UserError(f"{self.beta} is not positive", where="beta", fix="give a positive number, such as 0.1")
        if not 0.0 <= self.label_smoothing < 0.5:
            what, fix = f"{self.label_smoothing} is not below a half", "give a share from 0 to below 0.5"
            raise UserError(what, where="label_smoothing", fix=fix)


class Loss:
    """-log sigmoid(beta × difference of the log-ratios), a sum over pairs."""

    def __init__(self, settings: Settings):
        self._beta, self._smoothing = settings.beta, settings.label_smoothing

    def loss(self, out: TokenOut, batch: Batch) -> LossOut:
        """Compute the loss of one micro-batch, which must have the reference's log-probabilities.

        Metrics are means over pairs: `accuracy`; `margin`; `chosen_reward` and `rejected_reward`, beta × the log-ratio of policy to
        reference; `chosen_logprob` and `rejected_logprob`, the answers' log-probabilities.
        """
        assert batch.ref_logprob_M is not None
        chosen_P, rejected_P = pairs(self._beta * sum_by_document(out.logprob_M - batch.ref_logprob_M, batch))
        margin_P = chosen_P - rejected_P
        loss_P = -(1 - self._smoothing) * F.logsigmoid(margin_P) - self._smoothing * F.logsigmoid(-margin_P)
        with torch.no_grad():
            chosen_logprob_P, rejected_logprob_P = pairs(sum_by_document(out.logprob_M, batch))
            metrics = {
                "accuracy": (margin_P > 0).float(),
                "margin": margin_P,
                "chosen_reward": chosen_P,
                "rejected_reward": rejected_P,
                "chosen_logprob": chosen_logprob_P,
                "rejected_logprob": rejected_logprob_P,
            }
            sums = {name: values_P.sum() / batch.parts for name, values_P in metrics.items()}
        return LossOut(loss_P.sum() / batch.parts, {}, sums)

    def slope(self, batch: Batch) -> Tensor | None:
        return None

    def count(self, batch: Batch) -> float:
        return count_pairs(batch)


def pairs(values_S: Tensor) -> tuple[Tensor, Tensor]:
    """Split values of documents in pairs into those of the chosen and of the rejected answers, without filler."""
    values_P2 = values_S[: len(values_S) // 2 * 2].view(-1, 2)
    return values_P2[:, 0], values_P2[:, 1]


def count_pairs(batch: Batch) -> float:
    """Return the number of pairs in a batch, divided by the number of processes that share the batch."""
    assert batch.documents % 2 == 0, f"{batch.documents} documents do not form pairs"
    return batch.documents / 2 / batch.parts
