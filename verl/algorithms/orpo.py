"""ORPO (arXiv:2403.07691): fine-tune on the chosen answer, and raise its odds above those of the rejected one.

It has no reference, and may train a base model in one stage, without fine-tuning before. The likelihood of an answer is the geometric mean
over its tokens. The first term is the mean over the trained tokens of each chosen answer; TRL's is over prompts, too.

Dimensions: S documents; P pairs.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from verl.algorithms._checks import check_not_negative
from verl.algorithms._documents import sum_by_document, trained_tokens
from verl.algorithms._pairs import count_pairs, of_pairs, pairs
from verl.data.batch import Batch
from verl.engine.contract import LossOut, TokenOut

scorer, trains = "token_logprobs", "a policy by ORPO"
measures = "accuracy margin chosen_reward rejected_reward chosen_logprob rejected_logprob nll log_odds"
CERTAIN = -1e-7  # mean log-probability above which the odds of an answer grow no more, so that they stay finite


@dataclass
class Settings:
    # Weight of the odds ratio beside the loss of fine-tuning (λ in the paper).
    beta: float = 0.1

    def check(self) -> None:
        """Raises UserError naming the key."""
        check_not_negative("beta", self.beta)


class Loss:
    """Loss of fine-tuning on the chosen answer - beta × log sigmoid(difference of the log-odds), a sum over pairs."""

    def __init__(self, settings: Settings):
        self._beta = settings.beta

    def loss(self, out: TokenOut, batch: Batch) -> LossOut:
        """The reward is beta × the mean log-probability. `nll` is the first term, and `log_odds` the difference of the log-odds."""
        mean_S = sum_by_document(out.logprob_M, batch) / trained_tokens(batch).clamp(min=1)
        chosen_P, rejected_P = pairs(mean_S)
        log_odds_P = log_odds(chosen_P) - log_odds(rejected_P)
        loss_P = -chosen_P - self._beta * F.logsigmoid(log_odds_P)
        return of_pairs(loss_P, self._beta * mean_S, out, batch, nll=-chosen_P, log_odds=log_odds_P)

    def slope(self, batch: Batch) -> Tensor | None:
        return None

    def count(self, batch: Batch) -> float:
        return count_pairs(batch)


def log_odds(logprob: Tensor) -> Tensor:
    """Return log(p / (1 - p)) of the log-probability log p, without cancellation."""
    logprob = logprob.clamp(max=CERTAIN)
    improbable = torch.log1p(-logprob.exp())
    return logprob - torch.where(logprob < -0.693, improbable, torch.log(-torch.expm1(logprob)))
