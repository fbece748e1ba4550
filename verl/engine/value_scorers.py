"""Scorers with a head of their own: the values of a critic, the score of a reward model, the scores of a classifier's labels.

Dimensions: T tokens of the packed batch, or of this rank's slice; M trained positions; S documents; H hidden size; L labels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from verl.data.batch import Batch
from verl.engine.contract import ScoreOut, Slope, ValueOut
from verl.engine.scorers import Scorer
from verl.models.heads import head_of
from verl.parts import sum_over_parts


class ValueScorer(Scorer):
    """A critic, which gives a value for each trained token."""

    def forward(self, batch: Batch, slope: Slope | None = None) -> ValueOut:
        hidden_MH = self.hidden(batch).index_select(0, batch.trained_M)
        return ValueOut(_apply_head(self.model, hidden_MH).squeeze(-1))


class RewardScorer(Scorer):
    """A reward model, which gives a score for each document at its last token. Documents must not be padded."""

    def forward(self, batch: Batch, slope: Slope | None = None) -> ScoreOut:
        return ScoreOut(_scores(self, batch).squeeze(-1))


class LabelScorer(Scorer):
    """A classifier, which gives a score for each label of each document at its last token, [S, L]. Documents must not be padded."""

    def forward(self, batch: Batch, slope: Slope | None = None) -> ScoreOut:
        return ScoreOut(_scores(self, batch))


def _scores(scorer: Scorer, batch: Batch) -> Tensor:
    """Return the head's outputs at the last token of each document, score_SL."""
    hidden_TH = scorer.hidden(batch)
    last_S = batch.cu_seqlens[1 : batch.documents + 1].long() - 1 - batch.first_token
    hidden_SH = hidden_TH.index_select(0, last_S.clamp(0, len(hidden_TH) - 1))
    score_SL = _apply_head(scorer.model, hidden_SH)
    is_here_S1 = ((last_S >= 0) & (last_S < len(hidden_TH)))[:, None]
    return sum_over_parts(torch.where(is_here_S1, score_SL, 0.0), batch.parts)


def _apply_head(model: PreTrainedModel, hidden_MH: Tensor) -> Tensor:
    """Apply the head to each row, [M, L]. A single linear layer runs in float32, because bfloat16 has a resolution of only 1/256."""
    head = head_of(model)
    if isinstance(head, nn.Linear):
        return F.linear(hidden_MH.float(), head.weight.float(), None if head.bias is None else head.bias.float())
    number_ML: Tensor = head(hidden_MH)
    return number_ML.float()
