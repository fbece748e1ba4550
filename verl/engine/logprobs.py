"""Log-probabilities of given tokens; nothing outside this file sees logits.

Dimensions: T tokens of the packed batch, M trained positions, C positions of a chunk, H hidden size, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from verl.engine.contract import Slope, TokenOut
from verl.engine.softmax import entropy_of, logprobs_and_entropy, logprobs_with_gradient_
from verl.models.linear import add_outer, linear, multiply

# Logits that exist at a time, whatever the vocabulary: 0.5 GB in float32, 1.2 GB in bfloat16 where large products are faster.
CHUNK_LOGITS, CHUNK_LOGITS_HALF = 2**27, 4096 * 151936
Entropy: TypeAlias = Literal[False, True, "gradient"]


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
