"""Log-probabilities of given tokens; nothing outside this file sees logits.

Dimensions: T tokens of the packed batch, M trained positions, C positions of a chunk, H hidden size, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from verl import dist
from verl.data.batch import Batch
from verl.engine.softmax import entropy_of, logprobs_and_entropy, logprobs_with_gradient_
from verl.errors import UserError
from verl.models.attention import USE_ANOTHER
from verl.models.heads import Scorer, Slope, probe_documents
from verl.models.linear import add_outer, linear, multiply

# Logits that exist at a time, whatever the vocabulary: 0.5 GB in float32, 1.2 GB in bfloat16 where large products are faster.
CHUNK_LOGITS, CHUNK_LOGITS_HALF = 2**27, 4096 * 151936
Entropy: TypeAlias = Literal[False, True, "gradient"]
SAME = 1e-3  # log-probabilities in float32 that differ by less are the same


@dataclass
class TokenOut:
    """What a model says of the trained tokens, in float32.

    Attributes:
        logprob_M: natural log.
        entropy_M: of the distribution that each token was one of, in nats; None: not asked for.
    """

    logprob_M: Tensor
    entropy_M: Tensor | None = None


@dataclass(frozen=True)
class LogitRule:
    """What becomes of logits after the output layer: the architecture's factor and soft cap, then the temperature of sampling."""

    factor: float = 1.0
    soft_cap: float | None = None
    temperature: float = 1.0

    @classmethod
    def of(cls, config: Any) -> "LogitRule":
        factor = getattr(config, "logit_scale", None) or 1.0  # Cohere
        factor /= getattr(config, "logits_scaling", None) or 1.0  # Granite
        return cls(float(factor), getattr(config, "final_logit_softcapping", None))  # Gemma

    def __call__(self, logits_CV: Tensor) -> Tensor:
        logits_CV = logits_CV.float()
        if self.factor != 1.0:
            logits_CV = logits_CV * self.factor
        if self.soft_cap is not None:
            logits_CV = torch.tanh(logits_CV / self.soft_cap) * self.soft_cap
        return logits_CV if self.temperature == 1.0 else logits_CV / self.temperature


def token_scores(
    hidden_MH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    target_M: Tensor,
    rule: LogitRule = LogitRule(),
    slope: Slope | None = None,
    entropy: Entropy = False,
) -> TokenOut:
    """Log-probability of each target, without ever holding the [M, V] logits, in the forward or the backward pass.

    Args:
        hidden_MH: last hidden states at the positions that are trained.
        weight_VH: output embedding.
        bias_V: its bias, if it has one.
        target_M: token ids to score.
        rule: what the architecture does to its logits.
        slope: derivative of what is minimized by each log-probability, where it is known beforehand or from that alone. The backward
            pass then costs no logits: their gradient is formed while they are there, and *must* be asked for with these slopes.
        entropy: whether to return it too, and whether it has a gradient; a slope is of no use then.
    """
    if rule.soft_cap is None and entropy != "gradient":
        arguments = hidden_MH, weight_VH, bias_V, target_M, slope if torch.is_grad_enabled() else None
        logprob_M, entropy_M = _Scores.apply(*arguments, rule.factor / rule.temperature, bool(entropy))
        return TokenOut(logprob_M, entropy_M if entropy else None)
    # One chunk at least, even of no positions: a rank without trained tokens still takes part in the backward pass.
    chunks = [
        checkpoint(_chunk_scores, hidden_MH[rows], weight_VH, bias_V, target_M[rows], rule, entropy, use_reentrant=False)
        for rows in _chunks(max(1, len(target_M)), CHUNK_LOGITS // len(weight_VH))
    ]
    logprob_M, entropy_M = (torch.cat(parts) for parts in zip(*chunks, strict=True))
    return TokenOut(logprob_M, entropy_M if entropy else None)


def _chunks(length: int, size: int) -> list[slice]:
    return [slice(i, i + max(1, size)) for i in range(0, length, max(1, size))]


def _chunk_scores(
    hidden_CH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, target_C: Tensor, rule: LogitRule, entropy: Entropy
) -> tuple[Tensor, Tensor]:
    """Log-probabilities, and entropies or, where they are not asked for, nothing."""
    logits_CV = rule(F.linear(hidden_CH, weight_VH, bias_V))
    total_C = logits_CV.logsumexp(-1)
    logprob_C = logits_CV.gather(1, target_C[:, None]).squeeze(1) - total_C
    if not entropy:
        return logprob_C, total_C[:0]
    with torch.set_grad_enabled(torch.is_grad_enabled() and entropy == "gradient"):
        return logprob_C, entropy_of(logits_CV, total_C)


class _Scores(torch.autograd.Function):
    """Log-probabilities, and their gradient in three matrix products and one pass over the logits, which become it where they lie.

    With a slope that is done in the forward pass, while the logits are there; without, the backward pass makes them once more.
    Chunks are the same in every case: before an update, what is scored is what is trained, bit for bit where the kernels are one.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_MH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        target_M: Tensor,
        slope: Slope | None,
        factor: float,
        entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        arguments = hidden_MH, weight_VH, bias_V, target_M
        logprob_M = torch.empty(len(target_M), dtype=torch.float32, device=hidden_MH.device)
        entropy_M = torch.empty_like(logprob_M[: len(target_M) if entropy else 0])
        ctx.factor, ctx.is_known = factor, slope is not None
        if slope is None:
            for rows, logits_CV in _logits(hidden_MH, weight_VH, bias_V):
                logprob_M[rows], entropy_C = logprobs_and_entropy(logits_CV, target_M[rows], factor, entropy=entropy)
                if entropy:
                    entropy_M[rows] = entropy_C
                del logits_CV  # before the next chunk's are made
            ctx.save_for_backward(*arguments)
        else:
            found = _gradients(*arguments, slope, factor, ctx.needs_input_grad, logprob_M, entropy_M if entropy else None)
            ctx.save_for_backward(*found)
        ctx.mark_non_differentiable(entropy_M)
        return logprob_M, entropy_M

    @staticmethod
    def backward(ctx: Any, slope_M: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.is_known:
            return *ctx.saved_tensors, None, None, None, None
        hidden_MH, weight_VH, bias_V, target_M = ctx.saved_tensors
        found = _gradients(hidden_MH, weight_VH, bias_V, target_M, slope_M, ctx.factor, ctx.needs_input_grad)
        return *found, None, None, None, None


def _gradients(
    hidden_MH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    target_M: Tensor,
    slope: Slope,
    factor: float,
    needed: Sequence[bool],
    logprob_M: Tensor | None = None,
    entropy_M: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Of what is minimized, by hidden states, weight and bias, those that are needed.

    Args:
        logprob_M, entropy_M: get their values where they are given.
    """
    hidden_grad_MH = torch.empty_like(hidden_MH) if needed[0] else None
    weight_grad_VH = torch.zeros_like(weight_VH) if needed[1] else None
    bias_grad_V = torch.zeros_like(bias_V) if bias_V is not None and needed[2] else None
    for rows, logits_CV in _logits(hidden_MH, weight_VH, bias_V):
        if entropy_M is not None:
            _, entropy_M[rows] = logprobs_and_entropy(logits_CV, target_M[rows], factor)
        logprob_C, scale_C = logprobs_with_gradient_(logits_CV, target_M[rows], factor)
        scale_C = scale_C * (slope[rows] if isinstance(slope, Tensor) else slope(logprob_C, rows))
        if logprob_M is not None:
            logprob_M[rows] = logprob_C
        if hidden_grad_MH is not None:
            grad_CH = hidden_grad_MH[rows]
            torch.mul(multiply(logits_CV, weight_VH.T, out=grad_CH), scale_C[:, None], out=grad_CH)
        if weight_grad_VH is not None:
            add_outer(weight_grad_VH, logits_CV, (hidden_MH[rows] * scale_C[:, None]).to(hidden_MH.dtype))
        if bias_grad_V is not None:
            bias_grad_V += (logits_CV.T @ scale_C.to(logits_CV.dtype)).to(bias_grad_V.dtype)
        del logits_CV  # before the next chunk's are made
    return hidden_grad_MH, weight_grad_VH, bias_grad_V


def _logits(hidden_MH: Tensor, weight_VH: Tensor, bias_V: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
    """A chunk's rows and logits after the other; whoever reads them gives each away before the next."""
    limit = CHUNK_LOGITS if hidden_MH.dtype == torch.float32 else CHUNK_LOGITS_HALF
    for rows in _chunks(len(hidden_MH), limit // len(weight_VH)):
        yield rows, linear(hidden_MH[rows], weight_VH, bias_V)


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
