"""Length-normalised DPO (arXiv:2411.15124): DPO with the mean log-ratio of an answer's tokens in place of their sum.

In DPO, a long answer can gain more than a short one, which teaches length. Here a token counts as much as there are few of them.

Dimensions: S documents; P pairs.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from verl.algorithms._checks import check_positive, check_smoothing
from verl.algorithms._documents import trained_tokens
from verl.algorithms._pairs import count_pairs, log_ratios, of_pairs, pairs
from verl.data.batch import Batch
from verl.engine.contract import LossOut, TokenOut

needs_reference, scorer, trains = True, "token_logprobs", "a policy by length-normalised DPO"
measures = "accuracy margin chosen_reward rejected_reward chosen_logprob rejected_logprob"


@dataclass
class Settings:
    # Scale of the implicit reward, which is a mean over tokens; so it is larger than that of DPO.
    beta: float = 5.0
    # Assumed share of pairs with swapped labels, as in DPO.
    label_smoothing: float = 0.0

    def check(self) -> None:
        """Raises UserError naming the key."""
        check_positive("beta", self.beta)
        check_smoothing(self.label_smoothing)


class Loss:
    """-log sigmoid(beta × difference of the mean log-ratios), a sum over pairs."""

    def __init__(self, settings: Settings):
        self._beta, self._smoothing = settings.beta, settings.label_smoothing

    def loss(self, out: TokenOut, batch: Batch) -> LossOut:
        """The reward is beta × the mean log-ratio of policy to reference."""
        reward_S = self._beta * log_ratios(out, batch) / trained_tokens(batch).clamp(min=1)
        chosen_P, rejected_P = pairs(reward_S)
        margin_P = chosen_P - rejected_P
        loss_P = -(1 - self._smoothing) * F.logsigmoid(margin_P) - self._smoothing * F.logsigmoid(-margin_P)
        return of_pairs(loss_P, reward_S, out, batch)

    def slope(self, batch: Batch) -> Tensor | None:
        return None

    def count(self, batch: Batch) -> float:
        return count_pairs(batch)
