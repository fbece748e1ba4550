"""Log-probabilities of given tokens. No other module sees logits.

Dimensions: M trained positions, C positions of a chunk, H hidden size, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from verl.dist import HAS_TRITON
from verl.engine.contract import Slope, TokenOut
from verl.models.linear import add_outer, linear, multiply

# Maximum number of logits in memory, for any vocabulary: 0.5 GB in float32; 1.2 GB in bfloat16, where large matmuls are faster.
CHUNK_LOGITS, CHUNK_LOGITS_HALF = 2**27, 4096 * 151936
Entropy: TypeAlias = Literal[False, True, "gradient"]


@dataclass(frozen=True)
class LogitRule:
    """Post-processing of logits: the architecture's factor and soft cap, then the sampling temperature."""

    factor: float = 1.0
    soft_cap: float | None = None
    temperature: float = 1.0

    @classmethod
    def of(cls, config: Any) -> "LogitRule":
        config = config.get_text_config(decoder=True)  # a model with vision has its language model's config inside
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
    """Compute the log-probability of each target without materializing the [M, V] logits, in the forward or the backward pass.

    Args:
        hidden_MH: last hidden states at the trained positions.
        weight_VH: output embedding.
        bias_V: bias of the output layer, or None.
        target_M: token ids to score.
        rule: post-processing of the logits.
        slope: derivative of the loss with respect to each log-probability, if it is known in advance or depends on that log-probability
            alone. The gradient is then computed in the forward pass, and the backward pass needs no logits. The loss *must* have
            this derivative.
        entropy: whether to return the entropy; "gradient" makes it differentiable, and the slope is then ignored.
    """
    if rule.soft_cap is None and entropy != "gradient":
        arguments = hidden_MH, weight_VH, bias_V, target_M, slope if torch.is_grad_enabled() else None
        logprob_M, entropy_M = _Scores.apply(*arguments, rule.factor / rule.temperature, bool(entropy))
        return TokenOut(logprob_M, entropy_M if entropy else None)
    # At least one chunk, even if empty: a rank without trained tokens must still take part in the backward pass.
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
    """Return log-probabilities and entropies, which are empty if not requested."""
    return scores_of_logits(F.linear(hidden_CH, weight_VH, bias_V), target_C, rule, entropy)


def scores_of_logits(logits_CV: Tensor, target_C: Tensor, rule: LogitRule, entropy: Entropy) -> tuple[Tensor, Tensor]:
    """Same as `token_scores`, of logits in memory; the entropies are empty if not requested."""
    logits_CV = rule(logits_CV)
    total_C = logits_CV.logsumexp(-1)
    logprob_C = logits_CV.gather(1, target_C[:, None]).squeeze(1) - total_C
    if not entropy:
        return logprob_C, total_C[:0]
    with torch.set_grad_enabled(torch.is_grad_enabled() and entropy == "gradient"):
        return logprob_C, entropy_of(logits_CV, total_C)


class _Scores(torch.autograd.Function):
    """Log-probabilities, and their gradient with three matmuls and one pass over the logits, which it overwrites.

    With a slope, the forward pass computes the gradient; without one, the backward pass computes the logits again. The chunks are the same
    in both cases, so that log-probabilities before an update equal those in training, bit for bit if the kernels are the same.
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
                del logits_CV  # frees them before the next chunk's are computed
            ctx.save_for_backward(*arguments)
        else:
            found = _gradients(*arguments, slope, factor, ctx.needs_input_grad, TokenOut(logprob_M, entropy_M if entropy else None))
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
    scores: TokenOut | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Compute the needed gradients of the loss with respect to hidden states, weight and bias.

    Args:
        needed: which of the three gradients to compute.
        scores: output buffers, filled where they are given.
    """
    hidden_grad_MH = torch.empty_like(hidden_MH) if needed[0] else None
    weight_grad_VH = torch.zeros_like(weight_VH) if needed[1] else None
    bias_grad_V = torch.zeros_like(bias_V) if bias_V is not None and needed[2] else None
    for rows, logits_CV in _logits(hidden_MH, weight_VH, bias_V):
        if scores is not None and scores.entropy_M is not None:
            _, scores.entropy_M[rows] = logprobs_and_entropy(logits_CV, target_M[rows], factor)
        logprob_C, scale_C = logprobs_with_gradient_(logits_CV, target_M[rows], factor)
        scale_C = scale_C * (slope[rows] if isinstance(slope, Tensor) else slope(logprob_C, rows))
        if scores is not None:
            scores.logprob_M[rows] = logprob_C
        if hidden_grad_MH is not None:
            grad_CH = hidden_grad_MH[rows]
            torch.mul(multiply(logits_CV, weight_VH.T, out=grad_CH), scale_C[:, None], out=grad_CH)
        if weight_grad_VH is not None:
            add_outer(weight_grad_VH, logits_CV, (hidden_MH[rows] * scale_C[:, None]).to(hidden_MH.dtype))
        if bias_grad_V is not None:
            bias_grad_V += (logits_CV.T @ scale_C.to(logits_CV.dtype)).to(bias_grad_V.dtype)
        del logits_CV  # frees them before the next chunk's are computed
    return hidden_grad_MH, weight_grad_VH, bias_grad_V


def _logits(hidden_MH: Tensor, weight_VH: Tensor, bias_V: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
    """Yield the rows and logits of each chunk. The caller must release the logits before it takes the next chunk."""
    limit = CHUNK_LOGITS if hidden_MH.dtype == torch.float32 else CHUNK_LOGITS_HALF
    for rows in _chunks(len(hidden_MH), limit // len(weight_VH)):
        yield rows, linear(hidden_MH[rows], weight_VH, bias_V)


# Log-softmax of a chunk of logits


def logprobs_with_gradient_(logits_CV: Tensor, target_C: Tensor, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    """Compute the log-probability of each target under softmax(factor * logits), and its gradient with respect to the logits.

    The gradient is returned as a scale per row and an unscaled matrix that overwrites the logits. It is only used in matmuls, where the
    scale costs next to nothing, while another pass over [C, V] would not. The derivative of the loss with respect to the log-probability
    can be multiplied into the scale.

    Args:
        logits_CV: contiguous; overwritten, so that `scale_C[:, None] * logits_CV` is the gradient.
        target_C: token ids to score.
    Returns:
        logprob_C, natural log, and scale_C; both float32.
    """
    if HAS_TRITON and logits_CV.is_cuda:
        from verl.engine import softmax_triton

        return softmax_triton.logprobs_with_gradient_(logits_CV, target_C, factor)
    scaled_CV = logits_CV if factor == 1.0 and logits_CV.dtype == torch.float32 else logits_CV.float() * factor
    at_target_C, highest_C = scaled_CV.gather(1, target_C[:, None]).squeeze(1), scaled_CV.amax(-1)
    # In place from here on: on a CPU, each copy of the logits takes as long as the exponentials.
    power_CV = scaled_CV.sub_(highest_C[:, None]).exp_()
    total_C = power_CV.sum(-1)
    # d logprob / d logit = factor * (1 at the target - power / total)
    power_CV.scatter_add_(1, target_C[:, None], -total_C[:, None])
    if power_CV is not logits_CV:
        logits_CV.copy_(power_CV)
    return at_target_C - (highest_C + total_C.log()), -factor / total_C  # bit for bit equal to `logsumexp`


def logprobs_and_entropy(logits_CV: Tensor, target_C: Tensor, factor: float = 1.0, *, entropy: bool = True) -> tuple[Tensor, Tensor]:
    """Compute the log-probability of each target under softmax(factor * logits) and that distribution's entropy, without a gradient.

    Args:
        logits_CV: contiguous; not changed.
        target_C: token ids to score.
        entropy: whether to compute the entropy; on a GPU it needs no extra pass over the logits, on a CPU it needs one.
    Returns:
        logprob_C, natural log, and entropy_C in nats, empty if not requested; both float32.
    """
    logits_CV = logits_CV.detach()
    if HAS_TRITON and logits_CV.is_cuda:
        from verl.engine import softmax_triton

        logprob_C, entropy_C = softmax_triton.logprobs_and_entropy(logits_CV, target_C, factor)
        return logprob_C, entropy_C if entropy else entropy_C[:0]
    scaled_CV = logits_CV.float() * factor
    total_C = scaled_CV.logsumexp(-1)
    logprob_C = scaled_CV.gather(1, target_C[:, None]).squeeze(1) - total_C
    return logprob_C, entropy_of(scaled_CV, total_C) if entropy else total_C[:0]


def entropy_of(logits_CV: Tensor, total_C: Tensor) -> Tensor:
    """Compute the entropy of softmax(logits) from the logits and their logsumexp: log Z - sum of p * logit."""
    return total_C - ((logits_CV - total_C[:, None]).exp() * logits_CV).sum(-1)
