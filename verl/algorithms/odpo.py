"""DPO with a margin (ODPO, arXiv:2402.10571): the chosen answer must be better by an offset, which may differ from pair to pair.

A pair whose answers are far apart asks for more than one whose answers are nearly as good. `data.margin_key` names the column with the
margin of each pair, such as the difference of two scores of a reward model; without it, all pairs have the offset `algorithm.margin`.

Dimensions: S documents; P pairs.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from verl.algorithms._checks import check_not_negative, check_positive
from verl.algorithms._pairs import count_pairs, log_ratios, of_pairs, pairs
from verl.data.batch import Batch
from verl.engine.contract import LossOut, TokenOut
from verl.errors import one_of

if TYPE_CHECKING:
    from verl.data.numbered import NumberedBatch

needs_reference, scorer, reads, trains = True, "token_logprobs", "margins", "a policy by DPO with a margin"
of_margins = ("margin_weight", "margin_scale")
measures = "accuracy margin chosen_reward rejected_reward chosen_logprob rejected_logprob offset"


@dataclass
class Settings:
    # Scale of the implicit reward, as in DPO.
    beta: float = 0.1
    # Margin of every pair, besides that of its row.
    margin: float = 0.0
    # Weight of the rows' margins (α in the paper).
    margin_weight: float = 1.0
    # How the margin m of a row counts: "linear", as m; "log", as log(1 + m), which a few very large ones do not dominate.
    margin_scale: str = "linear"

    def check(self) -> None:
        """Raises UserError naming the key."""
        check_positive("beta", self.beta)
        check_not_negative("margin", self.margin)
        check_not_negative("margin_weight", self.margin_weight)
        one_of("margin_scale", self.margin_scale, ("linear", "log"))


class Loss:
    """-log sigmoid(beta × difference of the log-ratios - offset), a sum over pairs."""

    def __init__(self, settings: Settings):
        self._settings = settings

    def loss(self, out: TokenOut, batch: "Batch | NumberedBatch") -> LossOut:
        """The reward is beta × the log-ratio of policy to reference. Besides, `offset` is the margin that the loss aims at."""
        reward_S = self._settings.beta * log_ratios(out, batch)
        chosen_P, rejected_P = pairs(reward_S)
        offset_P = self._offset(batch, like=chosen_P)
        return of_pairs(-F.logsigmoid(chosen_P - rejected_P - offset_P), reward_S, out, batch, offset=offset_P)

    def _offset(self, batch: "Batch | NumberedBatch", like: Tensor) -> Tensor:
        number_S = getattr(batch, "number_S", None)
        fixed_P = torch.full_like(like, self._settings.margin)
        if number_S is None:
            return fixed_P
        margin_P, _ = pairs(number_S)
        return fixed_P + self._settings.margin_weight * (margin_P.log1p() if self._settings.margin_scale == "log" else margin_P)

    def slope(self, batch: Batch) -> Tensor | None:
        return None

    def count(self, batch: Batch) -> float:
        return count_pairs(batch)
