"""Attention of each document by itself, with PyTorch alone: on every device, in every dtype, with soft-capped scores and sinks.

Dimensions: T tokens of the packed batch; L tokens of one document; N query heads, K key-value heads, D head size.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

stepwise = 0  # calls so far that FlashAttention could not have computed


@torch.compiler.disable  # the lengths of the documents are no part of a graph
def attention_per_document(
    query_TND: Tensor,
    key_TKD: Tensor,
    value_TKD: Tensor,
    cu_seqlens: Tensor,
    *,
    scale: float | None = None,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    sink_N: Tensor | None = None,
) -> Tensor:
    """Compute causal attention within each document.

    Args:
        cu_seqlens, scale, sliding_window: same as in `flash_attention`.
        soft_cap: largest score; a score becomes soft_cap · tanh(score / soft_cap).
        sink_N: a score for each head that takes a share of the softmax and has no value.
    Returns:
        output_TND, contiguous.
    """
    lengths = cu_seqlens.diff().tolist()
    by_head = (x.transpose(0, 1).unsqueeze(0) for x in (query_TND, key_TKD, value_TKD))
    options: dict[str, Any] = {"scale": scale, "sliding_window": sliding_window}
    compute: Callable[..., Tensor] = _fused
    if soft_cap is not None or sink_N is not None:
        global stepwise
        stepwise += 1
        compute, options = _by_steps, {**options, "soft_cap": soft_cap, "sink_N": sink_N}
    # `split` instead of slices: its backward pass is one concatenation, while each slice would allocate a gradient of all T tokens.
    outputs = [compute(*document, **options) for document in zip(*(x.split(lengths, dim=2) for x in by_head), strict=True)]
    return torch.cat(outputs, dim=2).squeeze(0).transpose(0, 1).contiguous()  # some models take a view of it


def _fused(query_1NLD: Tensor, key_1KLD: Tensor, value_1KLD: Tensor, *, scale: float | None, sliding_window: int | None) -> Tensor:
    length = query_1NLD.shape[2]
    return F.scaled_dot_product_attention(
        query_1NLD,
        key_1KLD,
        value_1KLD,
        attn_mask=_window_mask(length, sliding_window, query_1NLD.device),
        is_causal=sliding_window is None or length <= sliding_window,
        scale=scale,
        enable_gqa=query_1NLD.shape[1] != key_1KLD.shape[1],
    )


def _by_steps(
    query_1NLD: Tensor,
    key_1KLD: Tensor,
    value_1KLD: Tensor,
    *,
    scale: float | None,
    sliding_window: int | None,
    soft_cap: float | None,
    sink_N: Tensor | None,
) -> Tensor:
    length, shared = query_1NLD.shape[2], query_1NLD.shape[1] // key_1KLD.shape[1]
    key_1NLD, value_1NLD = (x.repeat_interleave(shared, dim=1) for x in (key_1KLD, value_1KLD))
    score_1NLL = query_1NLD @ key_1NLD.mT * (query_1NLD.shape[-1] ** -0.5 if scale is None else scale)
    if soft_cap is not None:
        score_1NLL = torch.tanh(score_1NLL / soft_cap) * soft_cap
    mask_LL = _mask(length, sliding_window or length, query_1NLD.device)
    score_1NLL = score_1NLL.masked_fill(~mask_LL, -torch.inf)
    if sink_N is not None:
        sink_1NL1 = sink_N.to(score_1NLL.dtype).reshape(1, -1, 1, 1).expand(1, -1, length, 1)
        score_1NLL = torch.cat([score_1NLL, sink_1NL1], dim=-1)
    precise = torch.promote_types(score_1NLL.dtype, torch.float32)
    share_1NLL = score_1NLL.softmax(-1, dtype=precise)[..., :length].to(value_1NLD.dtype)
    return share_1NLL @ value_1NLD


def _window_mask(length: int, sliding_window: int | None, device: torch.device) -> Tensor | None:
    return None if sliding_window is None or length <= sliding_window else _mask(length, sliding_window, device)


def _mask(length: int, window: int, device: torch.device) -> Tensor:
    """Return which token (row) attends to which (column), bool."""
    position = torch.arange(length, device=device)
    distance = position[:, None] - position[None, :]
    return (distance >= 0) & (distance < window)
