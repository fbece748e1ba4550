"""Models on packed batches: log-probabilities of tokens, values of a critic, scores of a reward model.

Dimensions: T tokens of the packed batch, or of this rank's slice; M trained positions; S documents; H hidden size; V vocabulary;
R rank of an adapter.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from verl import dist
from verl.data.batch import Batch
from verl.engine.contract import Slope, TokenOut
from verl.engine.logprobs import Entropy, LogitRule, token_scores
from verl.errors import UserError
from verl.models.attention.packed import USE_ANOTHER, packed_kwargs

TOLERANCE = 1e-3  # of float32 log-probabilities, and of hidden states relative to the largest


class Scorer(nn.Module):
    """A transformers model that takes packed batches.

    The scorers' `forward(batch, slope)` returns the model's outputs for a batch; for `slope` see `verl.engine.contract.Algorithm`.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def hidden(self, batch: Batch) -> Tensor:
        """Return the last hidden states, hidden_TH."""
        hidden_1TH: Tensor = self.model.get_decoder()(
            input_ids=batch.input_ids_T[None],
            position_ids=batch.position_ids_T[None],
            attention_mask=None,
            use_cache=False,
            **packed_kwargs(batch),
        ).last_hidden_state
        return hidden_1TH[0]


def probe_documents(vocabulary: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return two short documents of different tokens, all trained."""
    return [(np.arange(7, 7 + 31 * n, 31, dtype=np.int32) % vocabulary, np.ones(n, dtype=bool)) for n in (5, 3)]


class TokenScorer(Scorer):
    """A causal language model that computes the log-probabilities of given tokens (`TokenOut`) on packed batches.

    The model and its output layer are one module, so that FSDP gathers the output embedding, which may be tied to the input embedding,
    exactly while it is used.

    Attributes:
        temperature: divisor of the logits, the same as in sampling.
        entropy: True to compute the entropy, "gradient" to compute it with a gradient for a loss with an entropy term.
    """

    def __init__(self, model: PreTrainedModel, temperature: float = 1.0, entropy: Entropy = False):
        super().__init__(model)
        self.rule = LogitRule.of(model.config)
        self.temperature, self.entropy = temperature, entropy

    def forward(self, batch: Batch, slope: Slope | None = None) -> TokenOut:
        """Score the batch's trained tokens; for `slope` see `token_scores`."""
        hidden_TH = self.hidden(batch)
        # Not `hidden_TH[trained_M]`, whose backward pass sorts to sum duplicates: positions are unique.
        hidden_MH, target_M = hidden_TH.index_select(0, batch.trained_M), batch.target_T[batch.trained_M]
        hidden_MH, weight_VH, bias_V = _output_layer(self.model.get_output_embeddings(), hidden_MH)
        rule = replace(self.rule, temperature=self.temperature)
        return token_scores(hidden_MH, weight_VH, bias_V, target_M, rule, slope, self.entropy)


def _output_layer(head: Any, hidden_MH: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the hidden states, weight and bias of the output layer's matmul.

    An adapter of rank R on the layer extends hidden states and weight by R columns, so that both matmuls are one, and the adapter's
    contribution is not lost in rounding, as it would be in a sum with the weight.
    """
    weight_VH, bias_V = head.weight, getattr(head, "bias", None)
    for name in getattr(head, "lora_A", ()):
        product_MR = head.lora_A[name](head.lora_dropout[name](hidden_MH)) * head.scaling[name]
        hidden_MH, weight_VH = torch.cat([hidden_MH, product_MR], 1), torch.cat([weight_VH, head.lora_B[name].weight], 1)
    return hidden_MH, weight_VH, bias_V


@torch.no_grad()
def check_scorer(scorer: TokenScorer) -> None:
    """Compare the scorer's log-probabilities of two short packed documents with those of each document alone, with eager attention.

    This verifies for any architecture that no token attends to another document, and that `LogitRule` is all that follows the output
    layer. The weights must be float32 and not sharded.

    Raises:
        UserError: they differ.
    """
    from verl.data.pack import collate

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
    if difference != difference:
        from verl.models.damage import check_finite

        check_finite(model, model.name_or_path or type(model).__name__)
    if not difference < TOLERANCE:
        raise UserError(
            f"the log-probabilities of {type(model).__name__} in packed batches differ from those of single documents by {difference:.2g}",
            where="model.partial_pretrain",
            fix=USE_ANOTHER,
        )


@torch.no_grad()
def check_parts(scorer: TokenScorer) -> None:
    """With context parallelism, compare this rank's slice of a batch with the whole batch. Every rank calls it.

    This verifies that only attention, which exchanges tokens between ranks, mixes tokens. The weights must be as in `check_scorer`.

    Raises:
        UserError: they differ.
    """
    if dist.context_size() == 1:
        return
    from verl.data.pack import collate

    # The longer document comes last: wherever the batch is cut, some trained token then depends on tokens of another slice.
    documents = probe_documents(scorer.model.config.vocab_size)[::-1]
    whole = collate(documents, [0, 1], multiple_of_tokens=dist.context_size())
    part = whole.part(dist.context_rank(), dist.context_size())
    mine_M = torch.isin(whole.trained_M, part.trained_M + dist.context_rank() * len(part.input_ids_T))
    device, training = scorer.model.device, scorer.model.training
    scorer.model.eval()
    expected_M, found_M = scorer(whole.to(device)).logprob_M[mine_M.to(device)], scorer(part.to(device)).logprob_M
    scorer.model.train(training)
    if dist.any_rank(not bool(((found_M - expected_M).abs() < TOLERANCE).all())):
        raise UserError(
            f"{type(scorer.model).__name__} gives different log-probabilities when a document is split over several processes",
            where="model.context_parallel_size",
            fix="set it to 1, or choose a model such as Qwen2, Qwen3, Llama or Mistral",
        )
