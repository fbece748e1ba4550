"""Triton kernels for decode attention: the newest token of each slot attends to the slot's KV cache.

A program handles one slot and one key-value head with all its query heads, so that keys and values are read once, and only the used
positions. If that gives too few programs to fill the GPU, the positions of a slot are split among several programs, and
a second kernel combines their results (Flash-Decoding, Dao et al. 2023).

Dimensions: S slots, L positions of a slot, B slots in use, N query heads, K key-value heads, D head size, P parts.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(1.4426950408889634)
PROGRAMS = 512  # enough to fill the GPU; with fewer, positions are split
MOST_PARTS = 16
TILE, WARPS, STAGES = 64, 4, 3  # TILE: positions read at a time


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
    """Attend, and write the new keys and values into the cache at position_B.

    Args:
        scale: factor of the attention scores.
        window: number of tokens that a token attends to, including itself; 0: all tokens up to itself.
    Returns:
        output_BND.
    """
    rows, heads, size = query_BND.shape
    key_heads, value_size = value_BKD.shape[1:]
    parts, group = parts_of(rows * key_heads), heads // key_heads
    output_BND = torch.empty(rows, heads, value_size, dtype=query_BND.dtype, device=query_BND.device)
    acc_BNPD = torch.empty(rows, heads, parts, value_size, dtype=torch.float32, device=query_BND.device) if parts > 1 else output_BND
    softmax_2BNP = torch.empty(2, rows, heads, parts, dtype=torch.float32, device=query_BND.device) if parts > 1 else output_BND
    padded, value_padded = (max(16, triton.next_power_of_2(n)) for n in (size, value_size))
    tile = tile_of(max(padded, value_padded), query_BND.dtype)
    _attend[(rows, key_heads, parts)](
        query_BND, key_BKD, value_BKD, key_SKLD, value_SKLD, position_B, output_BND, acc_BNPD, softmax_2BNP,
        query_BND.stride(0), query_BND.stride(1), key_BKD.stride(0), key_BKD.stride(1), value_BKD.stride(0), value_BKD.stride(1),
        key_SKLD.stride(0), key_SKLD.stride(1), value_SKLD.stride(0), value_SKLD.stride(1), rows, scale, window,
        group, max(16, triton.next_power_of_2(group)), size, padded, value_size, value_padded, tile, parts,
        num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip
    if parts > 1:
        _combine_parts[(rows, heads)](acc_BNPD, softmax_2BNP, output_BND, rows, heads, value_size, value_padded, parts, num_warps=1)
    return output_BND


def parts_of(programs: int) -> int:
    """Return among how many programs the positions of a slot are split, so that there are enough of them."""
    parts = 1
    while parts < MOST_PARTS and programs * parts < PROGRAMS:
        parts *= 2
    return parts


def tile_of(padded: int, dtype: torch.dtype) -> int:
    """Return the number of positions that a program reads at a time; fewer where keys or values are large."""
    tile = TILE if padded <= 128 else TILE // 2
    return tile // 2 if dtype == torch.float32 else tile


@triton.jit
def _attend(  # type: ignore[no-untyped-def]
    query, key, value, keys, values, positions, output, partial_acc, softmax_stats,
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
    part_length = tl.cdiv(tl.cdiv(position - first, tile), parts) * tile
    begin = first + part * part_length
    end = tl.minimum(begin + part_length, position)
    group_index, dim, value_dim, column = tl.arange(0, group_padded), tl.arange(0, padded), tl.arange(0, value_padded), tl.arange(0, tile)
    in_group, in_size, in_value = group_index < group, dim < size, value_dim < value_size
    head = key_head * group + group_index
    q = tl.load(query + row * query_b + head[:, None] * query_n + dim[None, :], mask=in_group[:, None] & in_size[None, :], other=0.0)
    new_key = tl.load(key + row * key_b + key_head * key_k + dim, mask=in_size, other=0.0).to(keys.dtype.element_ty)
    new_value = tl.load(value + row * value_b + key_head * value_k + value_dim, mask=in_value, other=0.0).to(values.dtype.element_ty)
    keys += row * keys_s + key_head * keys_k
    values += row * values_s + key_head * values_k
    is_first_part = part == 0
    tl.store(keys + position.to(tl.int64) * size + dim, new_key, mask=in_size & is_first_part)
    tl.store(values + position.to(tl.int64) * value_size + value_dim, new_value, mask=in_value & is_first_part)
    # The first part starts from the newest token, which is in registers; the others start empty.
    score = tl.sum(q.to(tl.float32) * new_key.to(tl.float32)[None, :], 1) * (scale * LOG2_E)
    highest = tl.where(is_first_part, score, float("-inf"))
    total = tl.where(is_first_part, tl.full([group_padded], 1.0, tl.float32), tl.zeros([group_padded], tl.float32))
    acc = tl.where(is_first_part, new_value.to(tl.float32)[None, :] + tl.zeros([group_padded, value_padded], tl.float32), 0.0)
    for start in range(begin, end, tile):
        at = start + column
        in_range = at < end
        k = tl.load(keys + dim[:, None] + at[None, :] * size, mask=in_size[:, None] & in_range[None, :], other=0.0)
        scores = tl.dot(q.to(k.dtype), k, input_precision="ieee") * (scale * LOG2_E)
        scores = tl.where(in_range[None, :], scores, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.exp2(scores - new_highest[:, None])
        rescale = tl.exp2(highest - new_highest)
        total = total * rescale + tl.sum(weights, 1)
        v = tl.load(values + at[:, None] * value_size + value_dim[None, :], mask=in_range[:, None] & in_value[None, :], other=0.0)
        acc = tl.dot(weights.to(v.dtype), v, acc * rescale[:, None], input_precision="ieee")
        highest = new_highest
    if parts == 1:
        acc = acc / total[:, None]
        offset = (row * heads + head[:, None]) * value_size + value_dim[None, :]
        tl.store(output + offset, acc.to(output.dtype.element_ty), mask=in_group[:, None] & in_value[None, :])
    else:
        head_part = (row * heads + head) * parts + part
        tl.store(partial_acc + head_part[:, None] * value_size + value_dim[None, :], acc, mask=in_group[:, None] & in_value[None, :])
        tl.store(softmax_stats + head_part, highest, mask=in_group)
        tl.store(softmax_stats + rows * heads * parts + head_part, total, mask=in_group)


@triton.jit
def _combine_parts(  # type: ignore[no-untyped-def]
    partial_acc, softmax_stats, output, rows, heads, value_size: tl.constexpr, value_padded: tl.constexpr, parts: tl.constexpr
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64) * heads + tl.program_id(1)
    part, dim = tl.arange(0, parts), tl.arange(0, value_padded)
    highest = tl.load(softmax_stats + head * parts + part)
    total = tl.load(softmax_stats + rows * heads * parts + head * parts + part)
    rescale = tl.exp2(highest - tl.max(highest, 0))
    offset = (head * parts + part[:, None]) * value_size + dim[None, :]
    acc = tl.load(partial_acc + offset, mask=(dim < value_size)[None, :], other=0.0)
    result = tl.sum(acc * rescale[:, None], 0) / tl.sum(total * rescale, 0)
    tl.store(output + head * value_size + dim, result.to(output.dtype.element_ty), mask=dim < value_size)
