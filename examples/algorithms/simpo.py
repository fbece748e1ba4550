"""A preference loss of your own: SimPO (arXiv:2405.14734), which needs no reference model.

    verl reward … algorithm.name=examples/algorithms/simpo.py algorithm.beta=2.5 algorithm.margin=1.0 optim.lr=1e-6

A method for pairs is a module with `scorer` and `Loss(settings)`, see verl/trainer/preference.py. Documents are pairs: document 2k is a
chosen answer, 2k + 1 the rejected one.

Dimensions: P pairs.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from verl.algorithms._documents import sum_by_document, trained_tokens
from verl.algorithms.dpo import count_pairs, pairs
from verl.data.batch import Batch
from verl.engine.contract import LossOut, TokenOut

scorer, trains = "token_logprobs", "a policy by SimPO"


@dataclass
class Settings:
    # Scale of the reward, which is beta × the mean log-probability of the answer.
    beta: float = 2.0
    # Target margin between the rewards of the chosen and the rejected answer (γ in the paper).
    margin: float = 1.0

    def check(self) -> None:
        if not self.beta > 0:
            raise ValueError(f"beta={self.beta} is not positive")


class Loss:
    """The sum over pairs of -log sigmoid(β/|chosen| log π(chosen) - β/|rejected| log π(rejected) - γ)."""

    def __init__(self, settings: Settings):
        self._beta, self._margin = settings.beta, settings.margin

    def loss(self, out: TokenOut, batch: Batch) -> LossOut:
        """Return the loss and the sums of its metrics over pairs: `accuracy`, `margin`, `chosen_reward` and `rejected_reward`.

        The log shows the metrics as means over pairs.
        """
        mean_logprob_S = sum_by_document(out.logprob_M, batch) / trained_tokens(batch).clamp(min=1)
        chosen_P, rejected_P = pairs(self._beta * mean_logprob_S)
        margin_P = chosen_P - rejected_P
        metrics = {"accuracy": (margin_P > 0).float(), "margin": margin_P, "chosen_reward": chosen_P, "rejected_reward": rejected_P}
        sums = {name: values_P.detach().sum() / batch.parts for name, values_P in metrics.items()}
        return LossOut(-F.logsigmoid(margin_P - self._margin).sum() / batch.parts, {}, sums)

    def slope(self, batch: Batch) -> Tensor | None:
        """Return None: the derivative depends on all log-probabilities of the pair."""
        return None

    def count(self, batch: Batch) -> float:
        """Return the number of pairs, by which the loss is divided."""
        return count_pairs(batch)
