"""Models that read packed batches: log-probabilities of tokens, values of a critic, scores of a reward model.

Dimensions: T tokens of the packed batch, or of this process's part; M trained positions; S documents; H hidden size; V vocabulary.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from verl import dist
from verl.data.batch import Batch
from verl.dist import sum_over_parts
from verl.engine.contract import ScoreOut, Slope, TokenOut, ValueOut
from verl.engine.logprobs import Entropy, LogitRule, token_scores
from verl.errors import UserError
from verl.models.attention.packed import USE_ANOTHER, packed_kwargs
from verl.models.heads import head_of

SAME = 1e-3  # log-probabilities, or relative hidden states, in float32 that differ by less are the same


class Scorer(nn.Module):
    """A model of the Hugging Face ecosystem that is called with packed batches."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, batch: Batch, slope: Slope | None = None) -> Any:
        """What the model says of a batch; for `slope` see `verl.engine.engine.Algorithm`."""
        raise NotImplementedError

    def hidden(self, batch: Batch) -> Tensor:
        """Last hidden states, hidden_TH."""
        hidden_1TH: Tensor = self.model.get_decoder()(
            input_ids=batch.input_ids_T[None],
            position_ids=batch.position_ids_T[None],
            attention_mask=None,
            use_cache=False,
            **packed_kwargs(batch),
        ).last_hidden_state
        return hidden_1TH[0]


class ValueScorer(Scorer):
    """A critic: a value for each trained token."""

    def forward(self, batch: Batch, slope: Slope | None = None) -> ValueOut:
        hidden_MH = self.hidden(batch).index_select(0, batch.trained_M)
        return ValueOut(_apply_head(self.model, hidden_MH))


class RewardScorer(Scorer):
    """A reward model: a score for each document, at its last token. Documents must not be padded."""

    def forward(self, batch: Batch, slope: Slope | None = None) -> ScoreOut:
        hidden_TH = self.hidden(batch)
        last_S = batch.cu_seqlens[1 : batch.documents + 1].long() - 1 - batch.first_token
        hidden_SH = hidden_TH.index_select(0, last_S.clamp(0, len(hidden_TH) - 1))
        score_S = _apply_head(self.model, hidden_SH)
        is_here_S = (last_S >= 0) & (last_S < len(hidden_TH))
        return ScoreOut(sum_over_parts(torch.where(is_here_S, score_S, 0.0), batch.parts))


@torch.no_grad()
def check_hidden(scorer: Scorer, *, where: str) -> None:
    """Compare last hidden states of two short packed documents with the architecture's own eager ones, each document alone.

    It shows for any architecture that its attention keeps documents apart. The weights must be float32 and not yet sharded.

    Raises:
        UserError: they differ.
    """
    from verl.data.pack import collate  # numpy arrays to a Batch, as in training

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
    if not difference < SAME:
        what = f"{type(model).__name__} in packed batches differs from the same model alone by {difference:.2g} of its hidden states"
        raise UserError(what, where=where, fix=USE_ANOTHER)


def probe_documents(vocabulary: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Two short documents of different tokens, all trained."""
    return [(np.arange(7, 7 + 31 * n, 31, dtype=np.int32) % vocabulary, np.ones(n, dtype=bool)) for n in (5, 3)]


def _apply_head(model: PreTrainedModel, hidden_MH: Tensor) -> Tensor:
    """A number for each row. In float32 where the head is one layer: bfloat16 would tell only every 256th of a value apart."""
    head = head_of(model)
    if isinstance(head, nn.Linear):
        return F.linear(hidden_MH.float(), head.weight.float(), None if head.bias is None else head.bias.float()).squeeze(-1)
    number_M1: Tensor = head(hidden_MH)
    return number_M1.float().squeeze(-1)


class TokenScorer(Scorer):
    """A causal language model that scores given tokens: from a packed batch to TokenOut.

    Wrapping the whole of it, output layer included, in one module lets FSDP gather the output embedding, which may be
    tied to the input's, for exactly as long as it is used.

    Attributes:
        temperature: by which logits are divided, as they are where tokens are drawn.
        entropy: whether to score it too: True, or "gradient" where the loss has a term for it.
    """

    def __init__(self, model: PreTrainedModel, temperature: float = 1.0, entropy: Entropy = False):
        super().__init__(model)
        self.rule = LogitRule.of(model.config)
        self.temperature, self.entropy = temperature, entropy

    def forward(self, batch: Batch, slope: Slope | None = None) -> TokenOut:
        """Score the batch's trained tokens; for `slope` see `token_scores`."""
        hidden_TH = self.hidden(batch)
        # Not `hidden_TH[trained_M]`: positions are unique, so the backward pass needs no sort to add up what falls on one.
        hidden_MH, target_M = hidden_TH.index_select(0, batch.trained_M), batch.target_T[batch.trained_M]
        hidden_MH, weight_VH, bias_V = _output_layer(self.model.get_output_embeddings(), hidden_MH)
        rule = replace(self.rule, temperature=self.temperature)
        return token_scores(hidden_MH, weight_VH, bias_V, target_M, rule, slope, self.entropy)


def _output_layer(head: Any, hidden_MH: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """What the output layer multiplies with what, and its bias.

    An adapter of rank R on it makes hidden states and weight longer by R, so that both products are one, and nothing of the
    adapter's is rounded away in a sum with the weight.
    """
    weight_VH, bias_V = head.weight, getattr(head, "bias", None)
    for name in getattr(head, "lora_A", ()):
        product_MR = head.lora_A[name](head.lora_dropout[name](hidden_MH)) * head.scaling[name]
        hidden_MH, weight_VH = torch.cat([hidden_MH, product_MR], 1), torch.cat([weight_VH, head.lora_B[name].weight], 1)
    return hidden_MH, weight_VH, bias_V


@torch.no_grad()
def check_scorer(scorer: TokenScorer) -> None:
    """Compare the scorer, on two short packed documents, with the architecture's own eager logits, each document alone.

    It shows for any architecture that its attention keeps documents apart and that nothing but `LogitRule` lies behind
    the output layer. The weights must be float32 and not yet sharded.

    Raises:
        UserError: they differ.
    """
    from verl.data.pack import collate  # numpy arrays to a Batch, as in training

    model = scorer.model
    device, training, packed_attention = model.device, model.training, model.config._attn_implementation
    model.eval()
    documents = probe_documents(model.config.vocab_size)
    found_M = scorer(collate(documents, [0, 1]).to(device)).logprob_M
    model.set_attn_implementation("eager")
    expected = []
    for ids, _ in documents:
        ids_T = torch.from_numpy(ids).long().to(device)
        logprob_TV = model(input_ids=ids_T[None], use_cache=False).logits[0].float().log_softmax(-1)
        expected.append(logprob_TV[:-1].gather(1, ids_T[1:, None]).squeeze(1))
    model.set_attn_implementation(packed_attention)
    model.train(training)
    difference = (found_M - torch.cat(expected)).abs().max().item()
    if not difference < SAME:
        raise UserError(
            f"{type(model).__name__} in packed batches differs from the same model alone by {difference:.2g} in log-probability",
            where="model.partial_pretrain",
            fix=USE_ANOTHER,
        )


@torch.no_grad()
def check_parts(scorer: TokenScorer) -> None:
    """Where processes share micro-batches, compare their parts of one with the whole. Every process calls it.

    It shows that nothing but attention, which has its exchange, mixes tokens. The weights must be as in `check_scorer`.

    Raises:
        UserError: they differ.
    """
    if dist.context_size() == 1:
        return
    from verl.data.pack import collate

    # The longer one last: wherever the batch is cut, a trained token has some of what it depends on in another part.
    documents = probe_documents(scorer.model.config.vocab_size)[::-1]
    whole = collate(documents, [0, 1], multiple_of_tokens=dist.context_size())
    part = whole.part(dist.context_rank(), dist.context_size())
    mine_M = torch.isin(whole.trained_M, part.trained_M + dist.context_rank() * len(part.input_ids_T))
    device, training = scorer.model.device, scorer.model.training
    scorer.model.eval()
    expected_M, found_M = scorer(whole.to(device)).logprob_M[mine_M.to(device)], scorer(part.to(device)).logprob_M
    scorer.model.train(training)
    if dist.any_rank(not bool(((found_M - expected_M).abs() < SAME).all())):
        raise UserError(
            f"{type(scorer.model).__name__} gives other log-probabilities when a document is spread over several processes",
            where="model.context_parallel_size",
            fix="set it to 1, or choose a model such as Qwen2, Qwen3, Llama or Mistral",
        )
