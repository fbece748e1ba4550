"""Divergence of a student from a teacher at each trained position, and its gradient.

The distributions over the vocabulary are compared in chunks of positions, and the gradient is computed in the same pass: neither model's
[M, V] logits are ever in memory, and nothing of the teacher is kept for the backward pass.

Generalised Jensen-Shannon divergence (GKD, arXiv:2306.13649, equation 1), of student p and teacher q:
    beta = 0: KL(q || p), forward;  beta = 1: KL(p || q), reverse;
    else beta KL(q || m) + (1 - beta) KL(p || m) with m = beta q + (1 - beta) p.

Dimensions: M trained positions, C positions of a chunk, H hidden size, V vocabulary, W tokens that both models have, K top tokens, B bins.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import log
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from verl.engine.contract import TokenOut
from verl.engine.logprobs import LogitRule, entropy_of
from verl.models.linear import add_outer, linear, multiply

# Number of logits of a chunk. Some eight tensors of this size, in float32, are in memory at the same time: 2 GiB.
CHUNK_LOGITS = 2**26

# The derivatives of a taught loss, a function of some log-probabilities and their slice of M: of_XC with X = 1, by each position's
# divergence, or X = 2, and by its log-probability, if the loss reads that too. They must be known in the forward pass.
Slopes: TypeAlias = Callable[[Tensor, slice], Tensor]
Gradients: TypeAlias = tuple[Tensor | None, Tensor | None, Tensor | None]


class Head(NamedTuple):
    """Last hidden states at the trained positions, and what makes logits of them."""

    hidden_MH: Tensor
    weight_VH: Tensor
    bias_V: Tensor | None
    rule: LogitRule

    def logits(self, rows: slice) -> Tensor:
        """Return raw logits, logits_CV."""
        return linear(self.hidden_MH[rows], self.weight_VH, self.bias_V)


@dataclass(frozen=True)
class Divergence:
    """What is compared.

    Attributes:
        beta: see above.
        top_k: compare only the teacher's likeliest tokens, and all others together as one; None: all tokens.
        temperature: divisor of both models' logits.
    """

    beta: float
    top_k: int | None = None
    temperature: float = 1.0

    def of(self, student_CW: Tensor, teacher_CW: Tensor) -> tuple[Tensor, Tensor]:
        """Return the divergence of each position, and its gradient with respect to the student's logits.

        Args:
            student_CW, teacher_CW: logits in float32, after the models' rules and the temperature.
        """
        if self.top_k is None or self.top_k >= teacher_CW.shape[1]:
            return compare(student_CW, teacher_CW, self.beta)
        top_CK = teacher_CW.topk(self.top_k).indices
        student_CB, teacher_CB = binned(student_CW, top_CK), binned(teacher_CW, top_CK)
        divergence_C, gradient_CB = compare(student_CB, teacher_CB, self.beta)
        # The last bin is the logsumexp of the other tokens: each of them has its share of the bin's gradient.
        gradient_CW = (student_CW - student_CB[:, -1:]).exp_() * gradient_CB[:, -1:]
        return divergence_C, gradient_CW.scatter_(1, top_CK, gradient_CB[:, :-1])


def binned(logits_CW: Tensor, top_CK: Tensor) -> Tensor:
    """Return the logits of the top tokens, and last one for all other tokens together, logits_CB with B = K + 1."""
    others_C1 = logits_CW.scatter(1, top_CK, float("-inf")).logsumexp(-1, keepdim=True)
    return torch.cat([logits_CW.gather(1, top_CK), others_C1], 1)


def compare(student_CB: Tensor, teacher_CB: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Return the divergence of the distributions, and its gradient with respect to the student's logits: p (g - sum of p g).

    Here g is the derivative by the student's probability: (1 - beta) log(p / m), or log(p / q) if beta = 1. If beta = 0, it is p - q.
    """
    p_log_CB, q_log_CB = student_CB.log_softmax(-1), teacher_CB.log_softmax(-1)
    p_CB = p_log_CB.exp()
    if beta == 0.0:
        q_CB = q_log_CB.exp()
        return (q_CB * (q_log_CB - p_log_CB)).sum(-1), p_CB - q_CB
    if beta == 1.0:
        slope_CB = p_log_CB - q_log_CB
        divergence_C = (p_CB * slope_CB).sum(-1)
        return divergence_C, p_CB * (slope_CB - divergence_C[:, None])
    mixture_log_CB = torch.logaddexp(p_log_CB + log(1 - beta), q_log_CB + log(beta))
    of_teacher_C = (q_log_CB.exp() * (q_log_CB - mixture_log_CB)).sum(-1)
    slope_CB = (1 - beta) * (p_log_CB - mixture_log_CB)
    of_student_C = (p_CB * slope_CB).sum(-1)
    return beta * of_teacher_C + of_student_C, p_CB * (slope_CB - of_student_C[:, None])


class Scored(NamedTuple):
    """Values at each trained position without a gradient, and the gradients of the loss by the student's hidden states and head."""

    out: TokenOut
    gradients: Gradients


@torch.no_grad()
def score(student: Head, teacher: Head, target_M: Tensor, kind: Divergence, slopes: Slopes | None, *, entropy: bool = False) -> Scored:
    """Compare the two models at each trained position, and compute the gradients if there are slopes.

    Args:
        target_M: the trained tokens.
        entropy: whether to compute the student's entropy.
    """
    gradients: Any = (None, None, None) if slopes is None else tuple(_zeros(tensor) for tensor in student[:3])
    found: list[tuple[Tensor, ...]] = []
    size = max(1, CHUNK_LOGITS // max(len(student.weight_VH), len(teacher.weight_VH)))
    for start in range(0, max(1, len(target_M)), size):  # at least one chunk, which may be empty
        rows = slice(start, start + size)
        values, gradient_CV = _chunk(student, teacher, target_M[rows], rows, kind, slopes, entropy)
        found.append(values)
        if gradient_CV is not None:
            _collect(student, rows, gradient_CV, gradients)
        del gradient_CV  # frees it before the next chunk's is computed
    columns = [torch.cat(column) for column in zip(*found, strict=True)]
    logprob_M, entropy_M, divergence_M, gap_M, agrees_M = columns
    return Scored(TokenOut(logprob_M, entropy_M if entropy else None, divergence_M, gap_M, agrees_M), gradients)


def _zeros(tensor: Tensor | None) -> Tensor | None:
    return torch.zeros_like(tensor) if tensor is not None and tensor.requires_grad else None


def _chunk(
    student: Head, teacher: Head, target_C: Tensor, rows: slice, kind: Divergence, slopes: Slopes | None, entropy: bool
) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """Return a chunk's values, and the gradient of the loss with respect to the student's raw logits, if there are slopes."""
    raw_CV = student.logits(rows)
    own_CV = student.rule(raw_CV)
    total_C = own_CV.logsumexp(-1)
    logprob_C = own_CV.gather(1, target_C[:, None]).squeeze(1) - total_C
    entropy_C = entropy_of(own_CV, total_C) if entropy else total_C
    both = min(len(student.weight_VH), len(teacher.weight_VH))
    rule = replace(student.rule, temperature=kind.temperature)
    student_CW = rule(raw_CV[:, :both])
    teacher_CW = replace(teacher.rule, temperature=kind.temperature)(teacher.logits(rows)[:, :both])
    divergence_C, gradient_CW = kind.of(student_CW, teacher_CW)
    gap_C = _logprobs(student_CW, target_C) - _logprobs(teacher_CW, target_C)
    agrees_C = (student_CW.argmax(-1) == teacher_CW.argmax(-1)).float()
    values = logprob_C, entropy_C, divergence_C, gap_C, agrees_C
    if slopes is None:
        return values, None
    by_divergence_C, *by_logprob = slopes(logprob_C, rows)
    gradient_CV = F.pad(_through(rule, student_CW, gradient_CW) * by_divergence_C[:, None], (0, raw_CV.shape[1] - both))
    for slope_C in by_logprob:
        softmax_CV = (own_CV - total_C[:, None]).exp_()
        softmax_CV.scatter_add_(1, target_C[:, None], -torch.ones_like(total_C)[:, None])
        gradient_CV -= _through(student.rule, own_CV, softmax_CV) * slope_C[:, None]
    return values, gradient_CV


def _logprobs(logits_CW: Tensor, target_C: Tensor) -> Tensor:
    return logits_CW.gather(1, target_C[:, None]).squeeze(1) - logits_CW.logsumexp(-1)


def _through(rule: LogitRule, logits_CV: Tensor, gradient_CV: Tensor) -> Tensor:
    """Return the gradient with respect to raw logits, from that with respect to the logits that the rule has made of them."""
    if rule.soft_cap is not None:
        gradient_CV = gradient_CV * (1 - (logits_CV * (rule.temperature / rule.soft_cap)) ** 2)
    return gradient_CV * (rule.factor / rule.temperature)


def _collect(student: Head, rows: slice, gradient_CV: Tensor, gradients: Gradients) -> None:
    """Add a chunk's part to the gradients of hidden states, weight and bias."""
    hidden_grad_MH, weight_grad_VH, bias_grad_V = gradients
    gradient_CV = gradient_CV.to(student.hidden_MH.dtype)
    if hidden_grad_MH is not None:
        part_CH = hidden_grad_MH[rows]
        part_CH.copy_(multiply(gradient_CV, student.weight_VH.T, out=torch.empty_like(part_CH)))
    if weight_grad_VH is not None:
        add_outer(weight_grad_VH, gradient_CV, student.hidden_MH[rows])
    if bias_grad_V is not None:
        bias_grad_V += gradient_CV.sum(0).to(bias_grad_V.dtype)


def attached(student: Head, scored: Scored) -> TokenOut:
    """Return the values as functions of the student's hidden states and head, with the gradients that are known already."""
    if not torch.is_grad_enabled():
        return scored.out
    out = scored.out
    logprob_M, divergence_M = _Attached.apply(*student[:3], scored.gradients, out.logprob_M, out.divergence_M)
    return replace(out, logprob_M=logprob_M, divergence_M=divergence_M)


class _Attached(torch.autograd.Function):
    """Log-probabilities and divergences whose backward pass returns gradients that the forward pass has computed."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_MH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        gradients: Gradients,
        logprob_M: Tensor,
        divergence_M: Tensor,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(*gradients)
        return logprob_M.clone(), divergence_M.clone()

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        return *ctx.saved_tensors, None, None, None
