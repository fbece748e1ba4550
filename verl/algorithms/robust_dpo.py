"""Robust DPO (arXiv:2403.00409): DPO whose loss is, on average over swapped labels, that of the true ones.

Conservative DPO (`label_smoothing` of `verl.algorithms.dpo`) stops at a margin at which it believes the labels as often as they are right.
This loss has no such margin: it corrects the bias, and pairs with a wrong label push the policy less.

Dimensions: S documents; P pairs.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from verl.algorithms._checks import check_positive, check_smoothing
from verl.algorithms._pairs import count_pairs, log_ratios, of_pairs, pairs
from verl.data.batch import Batch
from verl.engine.contract import LossOut, TokenOut

needs_reference, scorer, trains = True, "token_logprobs", "a policy by robust DPO"
measures = "accuracy margin chosen_reward rejected_reward chosen_logprob rejected_logprob"


@dataclass
class Settings:
    # Scale of the implicit reward, as in DPO.
    beta: float = 0.1
    # Share of pairs with swapped labels.
    label_smoothing: float = 0.1

    def check(self) -> None:
        """Raises UserError naming the key."""
        check_positive("beta", self.beta)
        check_smoothing(self.label_smoothing)


class Loss:
    """((1 - e) × DPO's loss - e × DPO's loss with swapped labels) / (1 - 2e), where e is `label_smoothing`; a sum over pairs."""

    def __init__(self, settings: Settings):
        self._beta, self._swapped = settings.beta, settings.label_smoothing

    def loss(self, out: TokenOut, batch: Batch) -> LossOut:
        """The reward is beta × the log-ratio of policy to reference."""
        reward_S = self._beta * log_ratios(out, batch)
        chosen_P, rejected_P = pairs(reward_S)
        margin_P = chosen_P - rejected_P
        as_labelled_P, as_swapped_P = -F.logsigmoid(margin_P), -F.logsigmoid(-margin_P)
        loss_P = ((1 - self._swapped) * as_labelled_P - self._swapped * as_swapped_P) / (1 - 2 * self._swapped)
        return of_pairs(loss_P, reward_S, out, batch)

    def slope(self, batch: Batch) -> Tensor | None:
        return None

    def count(self, batch: Batch) -> float:
        return count_pairs(batch)
