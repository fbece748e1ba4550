"""Stand-ins for the two kernels of attention to shared prefixes, by the formulas, in any dtype.

Dimensions: Q queries and X keys of a part; N query heads, K key-value heads, D head size.
"""

from itertools import pairwise

import torch
from torch import Tensor

from verl.models.attention.shared import Part


def scores(query_QND: Tensor, key_XKD: Tensor, part: Part, scale: float) -> Tensor:
    """Scores of all queries and keys, minus infinity where a query does not see a key."""
    repeats = query_QND.shape[1] // key_XKD.shape[1]
    score_NQX = torch.einsum("qnd,xnd->nqx", query_QND, key_XKD.repeat_interleave(repeats, 1)) * scale
    mask_QX = torch.zeros(len(query_QND), len(key_XKD), dtype=torch.bool)
    for (a, b), (c, d) in zip(pairwise(part.query_bounds.tolist()), pairwise(part.key_bounds.tolist()), strict=True):
        assert b - a <= part.longest_query and d - c <= part.longest_key
        mask_QX[a:b, c:d] = torch.ones(b - a, d - c).tril(d - c - (b - a)).bool() if part.is_causal else True
    return score_NQX.masked_fill(~mask_QX, -torch.inf)


def forward_part(query_QND: Tensor, key_XKD: Tensor, value_XKD: Tensor, part: Part, scale: float) -> tuple[Tensor, Tensor]:
    """What FlashAttention's forward pass gives."""
    score_NQX = scores(query_QND, key_XKD, part, scale)
    value_XND = value_XKD.repeat_interleave(query_QND.shape[1] // value_XKD.shape[1], 1)
    return torch.einsum("nqx,xnd->qnd", score_NQX.softmax(-1), value_XND).contiguous(), score_NQX.logsumexp(-1)


def backward_part(
    gradient_QND: Tensor,
    query_QND: Tensor,
    key_XKD: Tensor,
    value_XKD: Tensor,
    output_QND: Tensor,
    logsumexp_NQ: Tensor,
    part: Part,
    scale: float,
) -> tuple[Tensor, ...]:
    """What FlashAttention's backward pass gives: weights from the given log-sum-exp, and sums over the given output."""
    assert logsumexp_NQ.is_contiguous()
    repeats = query_QND.shape[1] // key_XKD.shape[1]
    key_XND, value_XND = (x.repeat_interleave(repeats, 1) for x in (key_XKD, value_XKD))
    share_NQX = (scores(query_QND, key_XKD, part, scale) - logsumexp_NQ[..., None]).exp()
    delta_NQ1 = (gradient_QND * output_QND).sum(-1).T[..., None]
    slope_NQX = share_NQX * (torch.einsum("qnd,xnd->nqx", gradient_QND, value_XND) - delta_NQ1) * scale
    key_gradient, value_gradient = (
        torch.einsum("nqx,qnd->xnd", weights, x).unflatten(1, (-1, repeats)).sum(2)
        for weights, x in ((slope_NQX, query_QND), (share_NQX, gradient_QND))
    )
    return torch.einsum("nqx,xnd->qnd", slope_NQX, key_XND), key_gradient, value_gradient
