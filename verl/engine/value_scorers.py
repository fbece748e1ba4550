"""Scorers with a scalar head: the values of a critic and the scores of a reward model.

Dimensions: T tokens of the packed batch, or of this rank's slice; M trained positions; S documents; H hidden size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from verl.data.batch import Batch
from verl.engine.contract import ScoreOut, Slope, ValueOut
from verl.engine.scorers import TOLERANCE, Scorer, probe_documents
from verl.errors import UserError
from verl.models.attention.packed import USE_ANOTHER
from verl.models.heads import head_of
from verl.parts import sum_over_parts


class ValueScorer(Scorer):
    """A critic, which gives a value for each trained token."""

    def forward(self, batch: Batch, slope: Slope | None = None) -> ValueOut:
        hidden_MH = self.hidden(batch).index_select(0, batch.trained_M)
        return ValueOut(_apply_head(self.model, hidden_MH))


class RewardScorer(Scorer):
    """A reward model, which gives a score for each document at its last token. Documents must not be padded."""

    def forward(self, batch: Batch, slope: Slope | None = None) -> ScoreOut:
        hidden_TH = self.hidden(batch)
        last_S = batch.cu_seqlens[1 : batch.documents + 1].long() - 1 - batch.first_token
        hidden_SH = hidden_TH.index_select(0, last_S.clamp(0, len(hidden_TH) - 1))
        score_S = _apply_head(self.model, hidden_SH)
        is_here_S = (last_S >= 0) & (last_S < len(hidden_TH))
        return ScoreOut(sum_over_parts(torch.where(is_here_S, score_S, 0.0), batch.parts))


@torch.no_grad()
def check_hidden(scorer: Scorer, *, where: str) -> None:
    """Compare the last hidden states of two short packed documents with those of each document alone, with eager attention.

    This verifies for any architecture that no token attends to another document. The weights must be float32 and not sharded.

    Raises:
        UserError: they differ.
    """
    from verl.data.pack import collate

    model = scorer.model
    training, packed_attention = model.training, model.config._attn_implementation
    model.eval()
    documents = probe_documents(model.config.get_text_config().vocab_size)
    found_TH = scorer.hidden(collate(documents, range(len(documents))).to(model.device))
    model.set_attn_implementation("eager")
    ids = [torch.from_numpy(ids).long().to(model.device) for ids, _ in documents]
    expected_TH = torch.cat([model.get_decoder()(input_ids=ids_T[None], use_cache=False).last_hidden_state[0] for ids_T in ids])
    model.set_attn_implementation(packed_attention)
    model.train(training)
    difference = ((found_TH - expected_TH).abs().max() / expected_TH.abs().max()).item()
    if not difference < TOLERANCE:
        what = f"the hidden states of {type(model).__name__} in packed batches differ from those of single documents"
        raise UserError(f"{what} by {difference:.2g}, relative to the largest value", where=where, fix=USE_ANOTHER)


def _apply_head(model: PreTrainedModel, hidden_MH: Tensor) -> Tensor:
    """Apply the head to each row. A single linear layer runs in float32, because bfloat16 has a resolution of only 1/256."""
    head = head_of(model)
    if isinstance(head, nn.Linear):
        return F.linear(hidden_MH.float(), head.weight.float(), None if head.bias is None else head.bias.float()).squeeze(-1)
    number_M1: Tensor = head(hidden_MH)
    return number_M1.float().squeeze(-1)
