"""A preference loss of your own: CPO (arXiv:2401.08417), which needs no reference model.

    verl reward … algorithm.name=examples/algorithms/cpo.py algorithm.beta=0.1 algorithm.nll_weight=1.0 optim.lr=1e-6

A method is a module with `scorer` and `Loss(settings)`, see verl/trainer/preference.py. Documents are pairs: document 2k is a chosen
answer, 2k + 1 the rejected one.

Dimensions: S documents; P pairs.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from verl.algorithms._documents import sum_by_document, trained_tokens
from verl.algorithms._pairs import count_pairs, of_pairs, pairs
from verl.data.batch import Batch
from verl.engine.contract import LossOut, TokenOut

scorer, trains = "token_logprobs", "a policy by CPO"


@dataclass
class Settings:
    # Scale of the reward, which is beta × the log-probability of the answer.
    beta: float = 0.1
    # Weight of the loss of fine-tuning on the chosen answers, a mean over their tokens.
    nll_weight: float = 1.0

    def check(self) -> None:
        if not self.beta > 0:
            raise ValueError(f"beta={self.beta} is not positive")


class Loss:
    """-log sigmoid(β log π(chosen) - β log π(rejected)) - weight × mean log π of the chosen answer's tokens, a sum over pairs."""

    def __init__(self, settings: Settings):
        self._beta, self._weight = settings.beta, settings.nll_weight

    def loss(self, out: TokenOut, batch: Batch) -> LossOut:
        """Return the loss and the sums of its metrics over pairs, such as `accuracy`, `margin` and `nll`.

        The log shows the metrics as means over pairs.
        """
        logprob_S = sum_by_document(out.logprob_M, batch)
        chosen_P, rejected_P = pairs(self._beta * logprob_S)
        mean_P, _ = pairs(logprob_S / trained_tokens(batch).clamp(min=1))
        loss_P = -F.logsigmoid(chosen_P - rejected_P) - self._weight * mean_P
        return of_pairs(loss_P, self._beta * logprob_S, out, batch, nll=-mean_P)

    def slope(self, batch: Batch) -> Tensor | None:
        """Return None: the derivative depends on all log-probabilities of the pair."""
        return None

    def count(self, batch: Batch) -> float:
        """Return the number of pairs, by which the loss is divided."""
        return count_pairs(batch)
