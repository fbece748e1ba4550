"""SimPO (arXiv:2405.14734): raise the mean log-probability of the chosen answer above that of the rejected one, by a margin.

It has no reference, so nothing but the learning rate keeps the policy near its start.

Dimensions: S documents; P pairs.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from verl.algorithms._checks import check_not_negative, check_positive
from verl.algorithms._documents import sum_by_document, trained_tokens
from verl.algorithms._pairs import count_pairs, of_pairs, pairs
from verl.data.batch import Batch
from verl.engine.contract import LossOut, TokenOut

scorer, trains = "token_logprobs", "a policy by SimPO"
measures = "accuracy margin chosen_reward rejected_reward chosen_logprob rejected_logprob"


@dataclass
class Settings:
    # Scale of the reward, which is a mean over tokens.
    beta: float = 2.0
    # Margin between the rewards of the two answers that the loss aims at (γ in the paper).
    margin: float = 1.0

    def check(self) -> None:
        """Raises UserError naming the key."""
        check_positive("beta", self.beta)
        check_not_negative("margin", self.margin)


class Loss:
    """-log sigmoid(beta × difference of the mean log-probabilities - margin), a sum over pairs."""

    def __init__(self, settings: Settings):
        self._beta, self._margin = settings.beta, settings.margin

    def loss(self, out: TokenOut, batch: Batch) -> LossOut:
        """The reward is beta × the mean log-probability of the answer."""
        reward_S = self._beta * sum_by_document(out.logprob_M, batch) / trained_tokens(batch).clamp(min=1)
        chosen_P, rejected_P = pairs(reward_S)
        return of_pairs(-F.logsigmoid(chosen_P - rejected_P - self._margin), reward_S, out, batch)

    def slope(self, batch: Batch) -> Tensor | None:
        return None

    def count(self, batch: Batch) -> float:
        return count_pairs(batch)
