"""Attention of each document by itself, with PyTorch alone: on every device, in every dtype, with soft-capped scores and sinks.

Dimensions: T tokens of the packed batch; L tokens of one document, X of it and the prefix that it shares; N query heads, K key-value heads,
D head size.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from verl.data.prefixes import Prefixes

stepwise = 0  # calls so far that FlashAttention could not have computed


@torch.compiler.disable  # the lengths of the documents are no part of a graph
def attention_per_document(
    query_TND: Tensor,
    key_TKD: Tensor,
    value_TKD: Tensor,
    bounds: "Tensor | Prefixes",
    *,
    scale: float | None = None,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    sink_N: Tensor | None = None,
) -> Tensor:
    """Compute causal attention within each document, and to the prefix that it shares with others.

    Args:
        bounds: offsets of the documents, as in `flash_attention`; or the prefixes that some of them share.
        scale, sliding_window: same as in `flash_attention`.
        soft_cap: largest score; a score becomes soft_cap · tanh(score / soft_cap).
        sink_N: a score for each head that takes a share of the softmax and has no value.
    Returns:
        output_TND, contiguous.
    """
    cu_seqlens, prefix_of = (bounds, {}) if isinstance(bounds, Tensor) else (bounds.segment_bounds, bounds.prefix_of_segment())
    lengths = cu_seqlens.diff().tolist()
    by_head = (x.transpose(0, 1).unsqueeze(0) for x in (query_TND, key_TKD, value_TKD))
    options: dict[str, Any] = {"scale": scale, "sliding_window": sliding_window}
    compute: Callable[..., Tensor] = _fused
    if soft_cap is not None or sink_N is not None:
        global stepwise
        stepwise += 1
        compute, options = _by_steps, {**options, "soft_cap": soft_cap, "sink_N": sink_N}
    # `split` instead of slices: its backward pass is one concatenation, while each slice would allocate a gradient of all T tokens.
    documents = list(zip(*(x.split(lengths, dim=2) for x in by_head), strict=True))
    for number, prefix in prefix_of.items():
        query, *own = documents[number]
        documents[number] = (query, *(torch.cat(both, dim=2) for both in zip(documents[prefix][1:], own, strict=True)))
    outputs = [compute(*document, **options) for document in documents]
    return torch.cat(outputs, dim=2).squeeze(0).transpose(0, 1).contiguous()  # some models take a view of it


def _fused(query_1NLD: Tensor, key_1KXD: Tensor, value_1KXD: Tensor, *, scale: float | None, sliding_window: int | None) -> Tensor:
    length, keys = query_1NLD.shape[2], key_1KXD.shape[2]
    is_causal = length == keys and (sliding_window is None or length <= sliding_window)
    return F.scaled_dot_product_attention(
        query_1NLD,
        key_1KXD,
        value_1KXD,
        attn_mask=None if is_causal else _mask(length, keys, sliding_window or keys, query_1NLD.device),
        is_causal=is_causal,
        scale=scale,
        enable_gqa=query_1NLD.shape[1] != key_1KXD.shape[1],
    )


def _by_steps(
    query_1NLD: Tensor,
    key_1KXD: Tensor,
    value_1KXD: Tensor,
    *,
    scale: float | None,
    sliding_window: int | None,
    soft_cap: float | None,
    sink_N: Tensor | None,
) -> Tensor:
    length, keys, shared = query_1NLD.shape[2], key_1KXD.shape[2], query_1NLD.shape[1] // key_1KXD.shape[1]
    key_1NXD, value_1NXD = (x.repeat_interleave(shared, dim=1) for x in (key_1KXD, value_1KXD))
    score_1NLX = query_1NLD @ key_1NXD.mT * (query_1NLD.shape[-1] ** -0.5 if scale is None else scale)
    if soft_cap is not None:
        score_1NLX = torch.tanh(score_1NLX / soft_cap) * soft_cap
    mask_LX = _mask(length, keys, sliding_window or keys, query_1NLD.device)
    score_1NLX = score_1NLX.masked_fill(~mask_LX, -torch.inf)
    if sink_N is not None:
        sink_1NL1 = sink_N.to(score_1NLX.dtype).reshape(1, -1, 1, 1).expand(1, -1, length, 1)
        score_1NLX = torch.cat([score_1NLX, sink_1NL1], dim=-1)
    precise = torch.promote_types(score_1NLX.dtype, torch.float32)
    share_1NLX = score_1NLX.softmax(-1, dtype=precise)[..., :keys].to(value_1NXD.dtype)
    return share_1NLX @ value_1NXD


def _mask(queries: int, keys: int, window: int, device: torch.device) -> Tensor:
    """Return which query (row) attends to which key (column), bool. The queries are the last of the tokens."""
    position = torch.arange(keys, device=device)
    distance = position[keys - queries :, None] - position[None, :]
    return (distance >= 0) & (distance < window)
