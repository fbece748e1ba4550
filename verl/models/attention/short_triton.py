"""Triton kernels for causal attention within short packed documents.

FlashAttention's kernels are tuned for long sequences. On documents of a few hundred tokens, overhead takes most of their time. Here, each
program computes one tile of one document. In the backward pass, one program handles all query heads that share a key head, so that their
gradients are summed in registers and not in separate passes.

The algorithm is FlashAttention-2's (Dao 2023, https://arxiv.org/abs/2307.08691).

Dimensions: T tokens of the packed batch, N query heads, K key-value heads, D head size.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(1.4426950408889634)
# Rows of a query tile, columns of a key tile, warps and pipeline stages, for each pass and head size.
FORWARD = {64: (64, 64, 4, 3), 128: (64, 32, 4, 3)}
QUERIES = {64: (64, 32, 4, 3), 128: (64, 64, 4, 2)}
KEYS = {64: (32, 64, 4, 2), 128: (32, 64, 4, 3)}


def forward(
    query_TND: Tensor, key_TKD: Tensor, value_TKD: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Return output_TND and, for the backward pass, logsumexp_NT in base 2, float32.

    Raises:
        ValueError: unsupported head size.
    """
    tokens, heads, size = query_TND.shape
    if size not in FORWARD:
        raise ValueError(f"head size {size} is not supported (supported: {', '.join(map(str, FORWARD))})")
    output_TND = torch.empty_like(query_TND, memory_format=torch.contiguous_format)
    logsumexp_NT = torch.empty(heads, tokens, dtype=torch.float32, device=query_TND.device)
    rows, columns, warps, stages = FORWARD[size]
    grid = (triton.cdiv(max_seqlen, rows) * (len(cu_seqlens) - 1), heads)
    _forward[grid](
        query_TND, key_TKD, value_TKD, output_TND, logsumexp_NT, cu_seqlens,
        *_strides(query_TND, key_TKD, value_TKD), tokens, scale, triton.cdiv(max_seqlen, rows),
        heads // key_TKD.shape[1], heads, size, rows, columns, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return output_TND, logsumexp_NT


def backward(
    output_gradient_TND: Tensor,
    query_TND: Tensor,
    key_TKD: Tensor,
    value_TKD: Tensor,
    output_TND: Tensor,
    logsumexp_NT: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query_TND, key_TKD and value_TKD, contiguous."""
    tokens, heads, size = query_TND.shape
    documents, key_heads = len(cu_seqlens) - 1, key_TKD.shape[1]
    query_gradient_TND, key_gradient_TKD, value_gradient_TKD = (
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query_TND, key_TKD, value_TKD)
    )
    delta_NT = torch.empty_like(logsumexp_NT)  # gradient · output of each row
    strides = _strides(query_TND, key_TKD, value_TKD)
    rows, columns, warps, stages = QUERIES[size]
    tiles = triton.cdiv(max_seqlen, rows)
    _backward_queries[(tiles * documents, heads)](
        query_TND, key_TKD, value_TKD, output_TND, output_gradient_TND, logsumexp_NT, delta_NT, query_gradient_TND, cu_seqlens,
        *strides, tokens, scale, tiles, heads // key_heads, heads, size, rows, columns, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    rows, columns, warps, stages = KEYS[size]
    tiles = triton.cdiv(max_seqlen, columns)
    _backward_keys[(tiles * documents, key_heads)](
        query_TND, key_TKD, value_TKD, output_gradient_TND, logsumexp_NT, delta_NT, key_gradient_TKD, value_gradient_TKD, cu_seqlens,
        *strides, tokens, scale, tiles, heads // key_heads, heads, key_heads, size, rows, columns, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return query_gradient_TND, key_gradient_TKD, value_gradient_TKD


def _strides(*tensors_TXD: Tensor) -> list[int]:
    """Return the strides of tokens and heads; the last dimension is contiguous."""
    return [stride for x in tensors_TXD for stride in (x.stride(0), x.stride(1))]


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    query, key, value, output, logsumexp, bounds,
    query_t, query_n, key_t, key_k, value_t, value_k, tokens, scale, tiles,
    group: tl.constexpr, heads: tl.constexpr, size: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    document, tile, head = tl.program_id(0) // tiles, tl.program_id(0) % tiles, tl.program_id(1)
    start = tl.load(bounds + document)
    length = tl.load(bounds + document + 1) - start
    if tile * rows >= length:
        return
    row, dim, column = tile * rows + tl.arange(0, rows), tl.arange(0, size), tl.arange(0, columns)
    real = row < length
    token = (start + row).to(tl.int64)
    key += start.to(tl.int64) * key_t + (head // group) * key_k
    value += start.to(tl.int64) * value_t + (head // group) * value_k
    q = tl.load(query + token[:, None] * query_t + head * query_n + dim[None, :], mask=real[:, None], other=0.0)
    highest = tl.full([rows], float("-inf"), tl.float32)
    total = tl.zeros([rows], tl.float32)
    mixed = tl.zeros([rows, size], tl.float32)
    for first in range(0, tl.minimum((tile + 1) * rows, length), columns):
        at = first + column
        k = tl.load(key + dim[:, None] + at[None, :] * key_t, mask=(at < length)[None, :], other=0.0)
        scores = tl.dot(q, k) * (scale * LOG2_E)
        # Columns beyond the document come after every real row, so the causal mask excludes them too.
        scores = tl.where(row[:, None] >= at[None, :], scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(highest - higher)
        total = total * shrink + tl.sum(weights, 1)
        v = tl.load(value + at[:, None] * value_t + dim[None, :], mask=(at < length)[:, None], other=0.0)
        mixed = tl.dot(weights.to(v.dtype), v, mixed * shrink[:, None])
        highest = higher
    mixed = mixed / total[:, None]
    tl.store(output + (token[:, None] * heads + head) * size + dim[None, :], mixed.to(output.dtype.element_ty), mask=real[:, None])
    tl.store(logsumexp + head * tokens + token, highest + tl.log2(total), mask=real)


@triton.jit
def _backward_queries(  # type: ignore[no-untyped-def]
    query, key, value, output, output_gradient, logsumexp, delta, query_gradient, bounds,
    query_t, query_n, key_t, key_k, value_t, value_k, tokens, scale, tiles,
    group: tl.constexpr, heads: tl.constexpr, size: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    document, tile, head = tl.program_id(0) // tiles, tl.program_id(0) % tiles, tl.program_id(1)
    start = tl.load(bounds + document)
    length = tl.load(bounds + document + 1) - start
    if tile * rows >= length:
        return
    row, dim, column = tile * rows + tl.arange(0, rows), tl.arange(0, size), tl.arange(0, columns)
    real = row < length
    token = (start + row).to(tl.int64)
    key += start.to(tl.int64) * key_t + (head // group) * key_k
    value += start.to(tl.int64) * value_t + (head // group) * value_k
    place = (token[:, None] * heads + head) * size + dim[None, :]
    q = tl.load(query + token[:, None] * query_t + head * query_n + dim[None, :], mask=real[:, None], other=0.0)
    gradient = tl.load(output_gradient + place, mask=real[:, None], other=0.0)
    result = tl.load(output + place, mask=real[:, None], other=0.0)
    dots = tl.sum(gradient.to(tl.float32) * result.to(tl.float32), 1)
    tl.store(delta + head * tokens + token, dots, mask=real)
    normalizer = tl.load(logsumexp + head * tokens + token, mask=real, other=0.0)
    mixed = tl.zeros([rows, size], tl.float32)
    for first in range(0, tl.minimum((tile + 1) * rows, length), columns):
        at = first + column
        k = tl.load(key + dim[:, None] + at[None, :] * key_t, mask=(at < length)[None, :], other=0.0)
        v = tl.load(value + dim[:, None] + at[None, :] * value_t, mask=(at < length)[None, :], other=0.0)
        weights = tl.exp2(tl.dot(q, k) * (scale * LOG2_E) - normalizer[:, None])
        weights = tl.where(row[:, None] >= at[None, :], weights, 0.0)
        slopes = weights * (tl.dot(gradient, v) - dots[:, None])
        mixed = tl.dot(slopes.to(k.dtype), tl.trans(k), mixed)
    tl.store(query_gradient + place, (mixed * scale).to(query_gradient.dtype.element_ty), mask=real[:, None])


@triton.jit
def _backward_keys(  # type: ignore[no-untyped-def]
    query, key, value, output_gradient, logsumexp, delta, key_gradient, value_gradient, bounds,
    query_t, query_n, key_t, key_k, value_t, value_k, tokens, scale, tiles,
    group: tl.constexpr, heads: tl.constexpr, key_heads: tl.constexpr, size: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    document, tile, key_head = tl.program_id(0) // tiles, tl.program_id(0) % tiles, tl.program_id(1)
    start = tl.load(bounds + document)
    length = tl.load(bounds + document + 1) - start
    if tile * columns >= length:
        return
    row, dim, column = tl.arange(0, rows), tl.arange(0, size), tile * columns + tl.arange(0, columns)
    real = column < length
    token = (start + column).to(tl.int64)
    k = tl.load(key + token[:, None] * key_t + key_head * key_k + dim[None, :], mask=real[:, None], other=0.0)
    v = tl.load(value + token[:, None] * value_t + key_head * value_k + dim[None, :], mask=real[:, None], other=0.0)
    key_sum = tl.zeros([columns, size], tl.float32)
    value_sum = tl.zeros([columns, size], tl.float32)
    first = tile * columns // rows * rows
    steps = tl.cdiv(length - first, rows)
    for step in range(group * steps):  # heads and query tiles as one loop, which the compiler can pipeline
        head = key_head * group + step // steps
        at = first + step % steps * rows + row
        inside = at < length
        asked = (start + at).to(tl.int64)
        q = tl.load(query + dim[:, None] + asked[None, :] * query_t + head * query_n, mask=inside[None, :], other=0.0)
        gradient = tl.load(output_gradient + (asked[:, None] * heads + head) * size + dim[None, :], mask=inside[:, None], other=0.0)
        # A row beyond the document has zero weights, because its normalizer is infinite.
        normalizer = tl.load(logsumexp + head * tokens + asked, mask=inside, other=float("inf"))
        dots = tl.load(delta + head * tokens + asked, mask=inside, other=0.0)
        weights = tl.exp2(tl.dot(k, q) * (scale * LOG2_E) - normalizer[None, :])
        weights = tl.where(at[None, :] >= column[:, None], weights, 0.0)
        value_sum = tl.dot(weights.to(gradient.dtype), gradient, value_sum)
        slopes = weights * (tl.dot(v, tl.trans(gradient)) - dots[None, :])
        key_sum = tl.dot(slopes.to(q.dtype), tl.trans(q), key_sum)
    place = (token[:, None] * key_heads + key_head) * size + dim[None, :]
    tl.store(key_gradient + place, (key_sum * scale).to(key_gradient.dtype.element_ty), mask=real[:, None])
    tl.store(value_gradient + place, value_sum.to(value_gradient.dtype.element_ty), mask=real[:, None])
