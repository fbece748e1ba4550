"""Attention of each slot's newest token to what the slot holds, as Triton kernels.

One program takes one slot and one key head with all its query heads, so that keys and values are read once, and only those in
use. Where that gives too few programs, each slot's positions are split among several, whose results a second kernel puts
together (Dao et al. 2023, Flash-Decoding).

Dimensions: S slots, L positions of a slot, B slots in use, N query heads, K key-value heads, D head size, P parts.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(1.4426950408889634)
PROGRAMS = 512  # from so many on, no positions are split
MOST_PARTS = 16
TILE, WARPS, STAGES = 64, 4, 3  # positions that are read at a time


def attend(
    query_BND: Tensor,
    key_BKD: Tensor,
    value_BKD: Tensor,
    key_SKLD: Tensor,
    value_SKLD: Tensor,
    position_B: Tensor,
    scale: float,
    window: int,
) -> Tensor:
    """output_BND. The newest keys and values are put into the slots at their positions.

    Args:
        window: how many tokens, itself included, a token sees; 0: all before it.
    """
    rows, heads, size = query_BND.shape
    key_heads, value_size = value_BKD.shape[1:]
    parts = 1
    while parts < MOST_PARTS and rows * key_heads * parts < PROGRAMS:
        parts *= 2
    group = heads // key_heads
    output_BND = torch.empty(rows, heads, value_size, dtype=query_BND.dtype, device=query_BND.device)
    mixed_BNPD = torch.empty(rows, heads, parts, value_size, dtype=torch.float32, device=query_BND.device) if parts > 1 else output_BND
    statistics_2BNP = torch.empty(2, rows, heads, parts, dtype=torch.float32, device=query_BND.device) if parts > 1 else output_BND
    padded, value_padded = (max(16, triton.next_power_of_2(n)) for n in (size, value_size))
    tile = TILE if max(padded, value_padded) <= 128 else TILE // 2
    if query_BND.dtype == torch.float32:
        tile //= 2
    _attend[(rows, key_heads, parts)](
        query_BND, key_BKD, value_BKD, key_SKLD, value_SKLD, position_B, output_BND, mixed_BNPD, statistics_2BNP,
        query_BND.stride(0), query_BND.stride(1), key_BKD.stride(0), key_BKD.stride(1), value_BKD.stride(0), value_BKD.stride(1),
        key_SKLD.stride(0), key_SKLD.stride(1), value_SKLD.stride(0), value_SKLD.stride(1), rows, scale, window,
        group, max(16, triton.next_power_of_2(group)), size, padded, value_size, value_padded, tile, parts,
        num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip
    if parts > 1:
        _put_together[(rows, heads)](mixed_BNPD, statistics_2BNP, output_BND, rows, heads, value_size, value_padded, parts, num_warps=1)
    return output_BND


@triton.jit
def _attend(  # type: ignore[no-untyped-def]
    query, key, value, keys, values, positions, output, mixed_parts, statistics,
    query_b, query_n, key_b, key_k, value_b, value_k, keys_s, keys_k, values_s, values_k, rows, scale, window,
    group: tl.constexpr, group_padded: tl.constexpr, size: tl.constexpr, padded: tl.constexpr,
    value_size: tl.constexpr, value_padded: tl.constexpr, tile: tl.constexpr, parts: tl.constexpr,
):  # fmt: skip
    row, key_head, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    heads = tl.num_programs(1) * group
    position = tl.load(positions + row).to(tl.int32)
    first = 0
    if window > 0:
        first = tl.maximum(position + 1 - window, 0)
    each = tl.cdiv(tl.cdiv(position - first, tile), parts) * tile
    begin = first + part * each
    end = tl.minimum(begin + each, position)
    member, dim, value_dim, column = tl.arange(0, group_padded), tl.arange(0, padded), tl.arange(0, value_padded), tl.arange(0, tile)
    real, in_size, in_value = member < group, dim < size, value_dim < value_size
    head = key_head * group + member
    q = tl.load(query + row * query_b + head[:, None] * query_n + dim[None, :], mask=real[:, None] & in_size[None, :], other=0.0)
    newest_key = tl.load(key + row * key_b + key_head * key_k + dim, mask=in_size, other=0.0).to(keys.dtype.element_ty)
    newest_value = tl.load(value + row * value_b + key_head * value_k + value_dim, mask=in_value, other=0.0).to(values.dtype.element_ty)
    keys += row * keys_s + key_head * keys_k
    values += row * values_s + key_head * values_k
    is_first = part == 0
    tl.store(keys + position.to(tl.int64) * size + dim, newest_key, mask=in_size & is_first)
    tl.store(values + position.to(tl.int64) * value_size + value_dim, newest_value, mask=in_value & is_first)
    # The first part begins with the newest token, from registers; the others with nothing.
    score = tl.sum(q.to(tl.float32) * newest_key.to(tl.float32)[None, :], 1) * (scale * LOG2_E)
    highest = tl.where(is_first, score, float("-inf"))
    total = tl.where(is_first, tl.full([group_padded], 1.0, tl.float32), tl.zeros([group_padded], tl.float32))
    mixed = tl.where(is_first, newest_value.to(tl.float32)[None, :] + tl.zeros([group_padded, value_padded], tl.float32), 0.0)
    for start in range(begin, end, tile):
        at = start + column
        there = at < end
        k = tl.load(keys + dim[:, None] + at[None, :] * size, mask=in_size[:, None] & there[None, :], other=0.0)
        scores = tl.dot(q.to(k.dtype), k, input_precision="ieee") * (scale * LOG2_E)
        scores = tl.where(there[None, :], scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(highest - higher)
        total = total * shrink + tl.sum(weights, 1)
        v = tl.load(values + at[:, None] * value_size + value_dim[None, :], mask=there[:, None] & in_value[None, :], other=0.0)
        mixed = tl.dot(weights.to(v.dtype), v, mixed * shrink[:, None], input_precision="ieee")
        highest = higher
    if parts == 1:
        mixed = mixed / total[:, None]
        place = (row * heads + head[:, None]) * value_size + value_dim[None, :]
        tl.store(output + place, mixed.to(output.dtype.element_ty), mask=real[:, None] & in_value[None, :])
    else:
        each_head = (row * heads + head) * parts + part
        tl.store(mixed_parts + each_head[:, None] * value_size + value_dim[None, :], mixed, mask=real[:, None] & in_value[None, :])
        tl.store(statistics + each_head, highest, mask=real)
        tl.store(statistics + rows * heads * parts + each_head, total, mask=real)


@triton.jit
def _put_together(  # type: ignore[no-untyped-def]
    mixed_parts, statistics, output, rows, heads, value_size: tl.constexpr, value_padded: tl.constexpr, parts: tl.constexpr
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64) * heads + tl.program_id(1)
    part, dim = tl.arange(0, parts), tl.arange(0, value_padded)
    highest = tl.load(statistics + head * parts + part)
    total = tl.load(statistics + rows * heads * parts + head * parts + part)
    shrink = tl.exp2(highest - tl.max(highest, 0))
    place = (head * parts + part[:, None]) * value_size + dim[None, :]
    mixed = tl.load(mixed_parts + place, mask=(dim < value_size)[None, :], other=0.0)
    result = tl.sum(mixed * shrink[:, None], 0) / tl.sum(total * shrink, 0)
    tl.store(output + head * value_size + dim, result.to(output.dtype.element_ty), mask=dim < value_size)
