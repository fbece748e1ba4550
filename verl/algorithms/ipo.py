"""IPO (arXiv:2310.12036, equation 17): move the difference of the answers' log-ratios to 1 / (2 beta), and no further.

DPO's loss falls without end where the labels of a pair never differ; this one has a minimum. The log-ratio of an answer is the mean over
its tokens, as its authors compute it and as TRL does, so that `beta` means the same for answers of any length.

Dimensions: S documents; P pairs.
"""

from dataclasses import dataclass

from torch import Tensor

from verl.algorithms._checks import check_positive
from verl.algorithms._documents import trained_tokens
from verl.algorithms._pairs import count_pairs, log_ratios, of_pairs, pairs
from verl.data.batch import Batch
from verl.engine.contract import LossOut, TokenOut

needs_reference, scorer, trains = True, "token_logprobs", "a policy by IPO"
measures = "accuracy margin chosen_reward rejected_reward chosen_logprob rejected_logprob"


@dataclass
class Settings:
    # Weight of the distance to the reference (τ in the paper): the larger, the closer the policy stays to it.
    beta: float = 0.1

    def check(self) -> None:
        """Raises UserError naming the key."""
        check_positive("beta", self.beta)


class Loss:
    """(difference of the mean log-ratios - 1 / (2 beta))², a sum over pairs."""

    def __init__(self, settings: Settings):
        self._beta = settings.beta

    def loss(self, out: TokenOut, batch: Batch) -> LossOut:
        """The reward is beta × the mean log-ratio of policy to reference, so that the margin to reach is 1/2."""
        mean_S = log_ratios(out, batch) / trained_tokens(batch).clamp(min=1)
        chosen_P, rejected_P = pairs(mean_S)
        loss_P = (chosen_P - rejected_P - 1 / (2 * self._beta)).square()
        return of_pairs(loss_P, self._beta * mean_S, out, batch)

    def slope(self, batch: Batch) -> Tensor | None:
        return None

    def count(self, batch: Batch) -> float:
        return count_pairs(batch)
