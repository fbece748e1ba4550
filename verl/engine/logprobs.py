"""Log-probabilities of given tokens; nothing outside this file sees logits.

Dimensions: T tokens of the packed batch, M trained positions, C positions of a chunk, H hidden size, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from verl.data.batch import Batch
from verl.errors import UserError
from verl.models.attention import packed_kwargs

CHUNK_LOGITS = 2**27  # logits that exist at a time, 0.5 GB in float32, whatever the vocabulary


@dataclass
class TokenOut:
    """What a model says of the trained tokens: `logprob_M`, natural log, float32."""

    logprob_M: Tensor


@dataclass(frozen=True)
class LogitRule:
    """What an architecture does to its logits after the output layer: a factor, then a soft cap."""

    factor: float = 1.0
    soft_cap: float | None = None

    @classmethod
    def of(cls, config: Any) -> "LogitRule":
        factor = getattr(config, "logit_scale", None) or 1.0  # Cohere
        factor /= getattr(config, "logits_scaling", None) or 1.0  # Granite
        return cls(float(factor), getattr(config, "final_logit_softcapping", None))  # Gemma

    def __call__(self, logits_CV: Tensor) -> Tensor:
        logits_CV = logits_CV.float()
        if self.factor != 1.0:
            logits_CV = logits_CV * self.factor
        return logits_CV if self.soft_cap is None else torch.tanh(logits_CV / self.soft_cap) * self.soft_cap


def token_logprobs(hidden_MH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, target_M: Tensor, rule: LogitRule = LogitRule()) -> Tensor:
    """Log-probability of each target, without ever holding the [M, V] logits, in the forward or the backward pass.

    Args:
        hidden_MH: last hidden states at the positions that are trained.
        weight_VH: output embedding.
        bias_V: its bias, if it has one.
        target_M: token ids to score.
        rule: what the architecture does to its logits.
    Returns:
        logprob_M in float32, natural log.
    """
    size = max(1, CHUNK_LOGITS // len(weight_VH))
    # One chunk at least, even of no positions: a rank without trained tokens still takes part in the backward pass.
    chunks = [
        checkpoint(_chunk_logprobs, hidden_MH[i : i + size], weight_VH, bias_V, target_M[i : i + size], rule, use_reentrant=False)
        for i in range(0, max(1, len(target_M)), size)
    ]
    return torch.cat(chunks)


def _chunk_logprobs(hidden_CH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, target_C: Tensor, rule: LogitRule) -> Tensor:
    logits_CV = rule(F.linear(hidden_CH, weight_VH, bias_V))
    return logits_CV.gather(1, target_C[:, None]).squeeze(1) - logits_CV.logsumexp(-1)


class TokenScorer(nn.Module):
    """A causal language model that scores given tokens: from a packed batch to TokenOut.

    Wrapping the whole of it, output layer included, in one module lets FSDP gather the output embedding, which may be
    tied to the input's, for exactly as long as it is used.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model
        self.rule = LogitRule.of(model.config)

    def forward(self, batch: Batch) -> TokenOut:
        hidden_TH = self.model.get_decoder()(
            input_ids=batch.input_ids_T[None],
            position_ids=batch.position_ids_T[None],
            attention_mask=None,
            use_cache=False,
            **packed_kwargs(batch),
        ).last_hidden_state[0]
        hidden_MH, target_M = hidden_TH[batch.trained_M], batch.target_T[batch.trained_M]
        head = self.model.get_output_embeddings()
        return TokenOut(token_logprobs(hidden_MH, head.weight, head.bias, target_M, self.rule))


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
    documents = _probe_documents(model.config.vocab_size)
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
    if not difference < 1e-3:
        raise UserError(
            f"{type(model).__name__} in packed batches differs from the same model alone by {difference:.2g} in log-probability",
            where="model.partial_pretrain",
            fix="this architecture cannot be trained in packed batches yet; choose a model such as Qwen2, Qwen3, Llama or Mistral",
        )


def _probe_documents(vocabulary: int) -> list[Any]:
    import numpy as np

    return [(np.arange(7, 7 + 31 * n, 31, dtype=np.int32) % vocabulary, np.ones(n, dtype=bool)) for n in (5, 3)]
