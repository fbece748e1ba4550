"""KTO (arXiv:2402.01306): learn from single answers that are good or bad, without pairs.

The log-ratio of policy to reference of a good answer is raised above a zero point, and that of a bad one lowered below it. The zero point
is the policy's divergence from the reference, as far as it can be estimated from the questions of the step with answers to other ones; it
has no gradient, and is at least 0. It is estimated once per step, over all of its rows, however they are divided over ranks and
micro-batches.

Dimensions: M trained positions; S documents; R rows, the documents without filler.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from verl.algorithms._checks import check_not_negative, check_positive
from verl.algorithms._documents import sum_by_document
from verl.algorithms._pairs import log_ratios
from verl.data.batch import Batch
from verl.engine.contract import LossOut, TokenOut

if TYPE_CHECKING:
    from verl.data.numbered import NumberedBatch

needs_reference, scorer, reads, trains = True, "token_logprobs", "labels", "a policy by KTO"
measures = "accuracy margin chosen_reward rejected_reward chosen_logprob rejected_logprob kl"
BALANCED = (1.0, 1.5)  # of the good answers' weight to the bad ones', as the paper recommends


@dataclass
class Settings:
    # Scale of the implicit reward: the larger, the closer the policy stays to the reference, the model that the run starts from.
    beta: float = 0.1
    # Weight of the good answers' loss, and of the bad ones'. If one kind is rarer, weigh it up.
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    def check(self) -> None:
        """Raises UserError naming the key."""
        check_positive("beta", self.beta)
        check_not_negative("desirable_weight", self.desirable_weight)
        check_not_negative("undesirable_weight", self.undesirable_weight)


class Loss:
    """weight × (1 - sigmoid(±beta × (log-ratio - zero point))), with + for good answers and - for bad ones; a sum over rows."""

    def __init__(self, settings: Settings):
        self._settings = settings

    def estimate(self, out: TokenOut, batch: Batch) -> Tensor:
        """Return the sum of the log-ratios of answers to other questions. Its mean over the step's rows is `batch.estimate`."""
        return log_ratios(out, batch)[: batch.documents].sum() / batch.parts

    def loss(self, out: TokenOut, batch: "NumberedBatch") -> LossOut:
        """Compute the loss of a micro-batch, whose rows have the number 1 if they are good and 0 if they are bad.

        The reward is beta × the log-ratio. Metrics: `chosen_reward` and `chosen_logprob` are means over the good rows, `rejected_…` over
        the bad ones, and `margin` is the difference of the rewards; `accuracy` is the share of rows on their side of the zero point, and
        `kl` the zero point.
        """
        assert batch.estimate is not None
        keys, zero = self._settings, batch.estimate.clamp(min=0)
        ratio_R = log_ratios(out, batch)[: batch.documents]
        is_good_R = batch.number_S[: batch.documents] > 0
        side_R = torch.where(is_good_R, 1.0, -1.0)
        weight_R = torch.where(is_good_R, keys.desirable_weight, keys.undesirable_weight)
        loss_R = weight_R * (1 - torch.sigmoid(side_R * keys.beta * (ratio_R - zero)))
        with torch.no_grad():
            of_good_R, of_bad_R = _shares(is_good_R, batch.mean_number)
            reward_R, logprob_R = keys.beta * ratio_R, sum_by_document(out.logprob_M, batch)[: batch.documents]
            metrics = {
                "accuracy": (side_R * (ratio_R - zero) > 0).float(),
                "margin": (of_good_R - of_bad_R) * reward_R,
                "chosen_reward": of_good_R * reward_R,
                "rejected_reward": of_bad_R * reward_R,
                "chosen_logprob": of_good_R * logprob_R,
                "rejected_logprob": of_bad_R * logprob_R,
                "kl": zero.expand(len(ratio_R)),
            }
            sums = {name: values_R.sum() / batch.parts for name, values_R in metrics.items()}
        return LossOut(loss_R.sum() / batch.parts, {}, sums)

    def slope(self, batch: Batch) -> Tensor | None:
        return None

    def count(self, batch: Batch) -> float:
        """Return the number of rows, divided by the number of processes that share the batch."""
        return batch.documents / batch.parts

    def notes(self, number_R: np.ndarray) -> list[str]:
        """Say how many rows are good and bad, and whether their weights are as the paper recommends."""
        good = int((number_R > 0).sum())
        bad = len(number_R) - good
        said = [f"{good:,} good and {bad:,} bad answers"]
        weights = good * self._settings.desirable_weight, bad * self._settings.undesirable_weight
        if min(weights) == 0:
            return [*said, "warning: only answers of one kind are trained, which moves the policy in one direction"]
        if not BALANCED[0] * 0.95 <= weights[0] / weights[1] <= BALANCED[1] * 1.05:
            least, most = (weights[1] * ratio / good for ratio in BALANCED)
            keys = f"the paper recommends a ratio from 1 to 1.5, which algorithm.desirable_weight from {least:.3g} to {most:.3g} gives"
            said.append(f"warning: all good answers weigh {weights[0] / weights[1]:.3g} times all bad ones; {keys}")
        return said


def _shares(is_good_R: Tensor, good_share: Tensor) -> tuple[Tensor, Tensor]:
    """Return factors whose mean over all rows, with a value of each row, is that value's mean over the good rows, and over the bad ones."""
    good_R = is_good_R.float()
    return good_R / good_share.clamp(min=1e-9), (1 - good_R) / (1 - good_share).clamp(min=1e-9)
