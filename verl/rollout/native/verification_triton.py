"""Triton kernels of a verify step: attention of several new tokens of each row, and sampling at each of their positions.

Attention is that of `attention_triton`, but for its query rows: a program handles all new tokens of a row with all query heads of one
key-value head, so that keys and values of the slot are read once. The sampling rule is that of `sampler_triton`.

Dimensions: S slots, L positions of a slot, B rows of a step, Q tokens of a row, T = B · Q, N query heads, J key-value heads, D head size,
P parts, V vocabulary, K vocabulary blocks.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from verl.rollout.native.attention_triton import LOG2_E, STAGES, WARPS, _combine_parts, parts_of, tile_of
from verl.rollout.native.sampler_triton import BLOCK, _block_sums, _choose
from verl.rollout.native.slots import State


def attend(
    query_TND: Tensor,
    key_TJD: Tensor,
    value_TJD: Tensor,
    key_SJLD: Tensor,
    value_SJLD: Tensor,
    place_2B: Tensor,
    scale: float,
    window: int,
) -> Tensor:
    """Attend, and write the keys and values of the newest tokens and of their drafts into the cache.

    Args:
        place_2B: position of the newest token of each row, and its number of drafts, at most Q - 1. Tokens behind the drafts write nothing,
            and their output has no meaning.
        scale: factor of the attention scores.
        window: number of tokens that a token attends to, including itself; 0: all tokens up to itself.
    Returns:
        output_TND.
    """
    tokens, heads, size = query_TND.shape
    rows, (key_heads, value_size) = place_2B.shape[1], value_TJD.shape[1:]
    width, group = tokens // rows, heads // key_heads
    parts = parts_of(rows * key_heads)
    device, query_rows = query_TND.device, max(16, triton.next_power_of_2(width * group))
    output_TND = torch.empty(tokens, heads, value_size, dtype=query_TND.dtype, device=device)
    acc_TNPD = torch.empty(tokens, heads, parts, value_size, dtype=torch.float32, device=device) if parts > 1 else output_TND
    softmax_2TNP = torch.empty(2, tokens, heads, parts, dtype=torch.float32, device=device) if parts > 1 else output_TND
    padded, value_padded = (max(16, triton.next_power_of_2(n)) for n in (size, value_size))
    tile = tile_of(max(padded, value_padded), query_TND.dtype)
    _attend[(rows, key_heads, parts)](
        query_TND, key_TJD, value_TJD, key_SJLD, value_SJLD, place_2B[0], place_2B[1], output_TND, acc_TNPD, softmax_2TNP,
        query_TND.stride(0), query_TND.stride(1), key_TJD.stride(0), key_TJD.stride(1), value_TJD.stride(0), value_TJD.stride(1),
        key_SJLD.stride(0), key_SJLD.stride(1), value_SJLD.stride(0), value_SJLD.stride(1), tokens, scale, window,
        group, width, max(16, triton.next_power_of_2(width)), query_rows, size, padded, value_size, value_padded, tile, parts,
        num_warps=WARPS if query_rows * value_padded <= 64 * 128 else 2 * WARPS,
        num_stages=STAGES if query_rows * value_padded <= 64 * 128 else 2,
    )  # fmt: skip
    if parts > 1:
        _combine_parts[(tokens, heads)](acc_TNPD, softmax_2TNP, output_TND, tokens, heads, value_size, value_padded, parts, num_warps=1)
    return output_TND


@triton.jit
def _attend(  # type: ignore[no-untyped-def]
    query, key, value, keys, values, positions, counts, output, partial_acc, softmax_stats,
    query_t, query_n, key_t, key_j, value_t, value_j, keys_s, keys_j, values_s, values_j, tokens, scale, window,
    group: tl.constexpr, width: tl.constexpr, width_padded: tl.constexpr, query_rows: tl.constexpr, size: tl.constexpr,
    padded: tl.constexpr, value_size: tl.constexpr, value_padded: tl.constexpr, tile: tl.constexpr, parts: tl.constexpr,
):  # fmt: skip
    row, key_head, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    heads = tl.num_programs(1) * group
    position, count = tl.load(positions + row).to(tl.int32), tl.load(counts + row).to(tl.int32)
    first = 0
    if window > 0:
        first = tl.maximum(position + 1 - window, 0)
    part_length = tl.cdiv(tl.cdiv(position - first, tile), parts) * tile
    begin = first + part * part_length
    end = tl.minimum(begin + part_length, position)
    query_row, dim, value_dim, column = tl.arange(0, query_rows), tl.arange(0, padded), tl.arange(0, value_padded), tl.arange(0, tile)
    in_rows, in_size, in_value = query_row < width * group, dim < size, value_dim < value_size
    token = row * width + query_row // group
    head = key_head * group + query_row % group
    ahead = tl.minimum(query_row // group, count)
    query_mask = in_rows[:, None] & in_size[None, :]
    q = tl.load(query + token[:, None] * query_t + head[:, None] * query_n + dim[None, :], mask=query_mask, other=0.0)
    keys += row * keys_s + key_head * keys_j
    values += row * values_s + key_head * values_j
    highest = tl.full([query_rows], float("-inf"), tl.float32)
    total = tl.zeros([query_rows], tl.float32)
    acc = tl.zeros([query_rows, value_padded], tl.float32)
    if part == 0:  # the new tokens; the other parts have those of the slot alone
        new = tl.arange(0, width_padded)
        is_tried, new_at, new_token = new <= count, (position + new).to(tl.int64), row * width + new
        key_mask, value_mask = is_tried[None, :] & in_size[:, None], is_tried[:, None] & in_value[None, :]
        new_k = tl.load(key + new_token[None, :] * key_t + key_head * key_j + dim[:, None], mask=key_mask, other=0.0)
        new_v = tl.load(value + new_token[:, None] * value_t + key_head * value_j + value_dim[None, :], mask=value_mask, other=0.0)
        new_k, new_v = new_k.to(keys.dtype.element_ty), new_v.to(values.dtype.element_ty)
        tl.store(keys + new_at[None, :] * size + dim[:, None], new_k, mask=key_mask)
        tl.store(values + new_at[:, None] * value_size + value_dim[None, :], new_v, mask=value_mask)
        new_seen = new[None, :] <= ahead[:, None]
        if window > 0:
            new_seen = new_seen & (ahead[:, None] - new[None, :] < window)
        new_scores = tl.where(new_seen, tl.dot(q.to(new_k.dtype), new_k, input_precision="ieee") * (scale * LOG2_E), float("-inf"))
        highest = tl.max(new_scores, 1)  # a token sees itself
        new_weights = tl.exp2(new_scores - highest[:, None])
        total = tl.sum(new_weights, 1)
        acc = tl.dot(new_weights.to(new_v.dtype), new_v, input_precision="ieee")
    for start in range(begin, end, tile):
        at = start + column
        in_range = at < end
        k = tl.load(keys + dim[:, None] + at[None, :] * size, mask=in_size[:, None] & in_range[None, :], other=0.0)
        seen = in_range[None, :] & (query_row[:, None] >= 0)
        if window > 0:
            seen = seen & (position + ahead[:, None] - at[None, :] < window)
        scores = tl.where(seen, tl.dot(q.to(k.dtype), k, input_precision="ieee") * (scale * LOG2_E), float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, 1))
        base = tl.where(new_highest == float("-inf"), 0.0, new_highest)  # a token may see nothing of a tile at the start of its window
        weights = tl.exp2(scores - base[:, None])
        rescale = tl.exp2(highest - base)
        total = total * rescale + tl.sum(weights, 1)
        v = tl.load(values + at[:, None] * value_size + value_dim[None, :], mask=in_range[:, None] & in_value[None, :], other=0.0)
        acc = tl.dot(weights.to(v.dtype), v, acc * rescale[:, None], input_precision="ieee")
        highest = new_highest
    mask = in_rows[:, None] & in_value[None, :]
    if parts == 1:
        offset = (token * heads + head)[:, None] * value_size + value_dim[None, :]
        tl.store(output + offset, (acc / total[:, None]).to(output.dtype.element_ty), mask=mask)
    else:
        head_part = (token * heads + head) * parts + part
        tl.store(partial_acc + head_part[:, None] * value_size + value_dim[None, :], acc, mask=mask)
        tl.store(softmax_stats + head_part, highest, mask=in_rows)
        tl.store(softmax_stats + tokens * heads * parts + head_part, total, mask=in_rows)


def sample(
    logits_TV: Tensor, state: State, rows: int, temperature: Tensor, least_T: Tensor | None, factor: float, soft_cap: float | None
) -> tuple[Tensor, Tensor]:
    """Sample a token at each of the Q positions of each row, and leave the state as it is.

    Args:
        temperature, least_T, factor, soft_cap: see `sampler_triton.sample`.
    Returns:
        token_T, int64, and logprob_T.
    """
    tokens, vocabulary = logits_TV.shape
    blocks, device = triton.cdiv(vocabulary, BLOCK), logits_TV.device
    sums_4TK = torch.empty(4, tokens, blocks, dtype=torch.float32, device=device)
    token_T, logprob_T = torch.empty(tokens, dtype=torch.int64, device=device), torch.empty(tokens, dtype=torch.float32, device=device)
    least = logits_TV if least_T is None else least_T
    cap = 0.0 if soft_cap is None else soft_cap
    _block_sums[(tokens, blocks)](
        logits_TV, logits_TV.stride(0), least, temperature, sums_4TK, tokens, vocabulary, factor, cap,
        least_T is not None, BLOCK, num_warps=8,
    )  # fmt: skip
    _select[(tokens,)](
        logits_TV, logits_TV.stride(0), least, temperature, sums_4TK, tokens, vocabulary, blocks, factor, cap,
        token_T, logprob_T, state.generated_S, state.uniform_SG, state.uniform_SG.shape[1], tokens // rows,
        least_T is not None, triton.next_power_of_2(blocks), BLOCK, num_warps=8,
    )  # fmt: skip
    return token_T, logprob_T


@triton.jit
def _select(  # type: ignore[no-untyped-def]
    logits, logits_t, least, temperature, sums, tokens, vocabulary, blocks, factor, cap,
    chosen, logprobs, generated, uniforms, longest, width, is_filtered: tl.constexpr, blocks_padded: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    position = tl.program_id(0).to(tl.int64)
    row, ahead = position // width, position % width
    number = tl.minimum(tl.load(generated + row) + ahead, longest - 1)
    token, logprob = _choose(
        logits, logits_t, least, temperature, sums, position, uniforms + row * longest + number, tokens, vocabulary, blocks, factor, cap,
        is_filtered, blocks_padded, block,
    )  # fmt: skip
    tl.store(chosen + position, token.to(tl.int64))
    tl.store(logprobs + position, logprob)
