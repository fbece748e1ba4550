"""Sampling on the device: two Triton kernels at the end of each decode step.

The first kernel reads the logits once and writes a few sums for each block of the vocabulary. The second selects a block, reads it again,
selects a token in it, and updates the decode state for the next step. The sampling rule is that of `verl.rollout._sampler.sample`.

Dimensions: B slots in use, V vocabulary, K vocabulary blocks.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from verl.rollout.native.slots import State

BLOCK = 4096  # tokens per vocabulary block


def sample(logits_BV: Tensor, state: State, temperature: Tensor, least_B: Tensor | None, factor: float, soft_cap: float | None) -> None:
    """Sample a token for each of the first B slots, and append it to its response. Slots whose responses have ended do not change.

    Args:
        temperature: scalar on the device; 0 takes the first of the most likely tokens.
        least_B: lowest logit, as in logits_BV, of the tokens that top_k and top_p keep; None: all tokens are kept.
        factor, soft_cap: post-processing of logits (`LogitRule`).
    """
    rows, vocabulary = logits_BV.shape
    blocks = triton.cdiv(vocabulary, BLOCK)
    sums_4BK = torch.empty(4, rows, blocks, dtype=torch.float32, device=logits_BV.device)
    least = logits_BV if least_B is None else least_B
    cap = 0.0 if soft_cap is None else soft_cap
    _block_sums[(rows, blocks)](
        logits_BV, logits_BV.stride(0), least, temperature, sums_4BK, rows, vocabulary, factor, cap,
        least_B is not None, BLOCK, num_warps=8,
    )  # fmt: skip
    _select[(rows,)](
        logits_BV, logits_BV.stride(0), least, temperature, sums_4BK, rows, vocabulary, blocks, factor, cap,
        state.token_S, state.position_S, state.generated_S, state.limit_S, state.active_S, state.answer_SG, state.logprob_SG,
        state.uniform_SG, state.answer_SG.shape[1], state.stop_Z, len(state.stop_Z),
        triton.next_power_of_2(len(state.stop_Z)), least_B is not None, triton.next_power_of_2(blocks), BLOCK, num_warps=8,
    )  # fmt: skip


@triton.jit
def _scaled(logits, temperature, factor, cap):  # type: ignore[no-untyped-def]
    x = logits.to(tl.float32) * factor
    if cap > 0:
        x = (2.0 * tl.sigmoid(2.0 * x / cap) - 1.0) * cap
    return x / tl.where(temperature > 0, temperature, 1.0)


@triton.jit
def _block_sums(  # type: ignore[no-untyped-def]
    logits, logits_b, least, temperature, sums, rows, vocabulary, factor, cap, is_filtered: tl.constexpr, block: tl.constexpr
):  # fmt: skip
    row, number = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = number * block + tl.arange(0, block)
    in_range = token < vocabulary
    logit = tl.load(logits + row * logits_b + token, mask=in_range, other=0.0)
    x = tl.where(in_range, _scaled(logit, tl.load(temperature), factor, cap), float("-inf"))
    highest, highest_token = tl.max(x, 0, return_indices=True)
    weights = tl.exp(x - tl.where(highest == float("-inf"), 0.0, highest))
    total = tl.sum(weights, 0)
    kept = total
    if is_filtered:
        kept = tl.sum(tl.where(logit >= tl.load(least + row), weights, 0.0), 0)
    pointer = sums + row * tl.num_programs(1) + number
    plane = rows * tl.num_programs(1)
    tl.store(pointer, highest)
    tl.store(pointer + plane, total)
    tl.store(pointer + 2 * plane, kept)
    tl.store(pointer + 3 * plane, (number * block + highest_token).to(tl.float32))  # exact below 2**24


@triton.jit
def _select(  # type: ignore[no-untyped-def]
    logits, logits_b, least, temperature, sums, rows, vocabulary, blocks, factor, cap,
    tokens, positions, generated, limits, active, answers, logprobs, uniforms, longest, stops, stop_count,
    stops_padded: tl.constexpr, is_filtered: tl.constexpr, blocks_padded: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if tl.load(active + row) == 0:
        return
    count = tl.load(generated + row)
    token, logprob = _choose(
        logits, logits_b, least, temperature, sums, row, uniforms + row * longest + count, rows, vocabulary, blocks, factor, cap,
        is_filtered, blocks_padded, block,
    )  # fmt: skip
    tl.store(answers + row * longest + count, token)
    tl.store(logprobs + row * longest + count, logprob)
    tl.store(generated + row, count + 1)
    stop = tl.arange(0, stops_padded)
    is_stop = tl.max((tl.load(stops + stop, mask=stop < stop_count, other=-1) == token).to(tl.int32), 0)
    if (is_stop > 0) | (count + 1 >= tl.load(limits + row)):
        tl.store(active + row, 0)
    else:
        tl.store(tokens + row, token.to(tl.int64))
        tl.store(positions + row, tl.load(positions + row) + 1)


@triton.jit
def _choose(  # type: ignore[no-untyped-def]
    logits, logits_b, least, temperature, sums, row, uniform, rows, vocabulary, blocks, factor, cap,
    is_filtered: tl.constexpr, blocks_padded: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Return the token of a row and its log-probability; `uniform` is the address of its random number."""
    number, inside = tl.arange(0, blocks_padded), tl.arange(0, block)
    pointer, plane = sums + row * blocks + number, rows * blocks
    highest_K = tl.load(pointer, mask=number < blocks, other=float("-inf"))
    total_K = tl.load(pointer + plane, mask=number < blocks, other=0.0)
    kept_K = tl.load(pointer + 2 * plane, mask=number < blocks, other=0.0)
    highest, first = tl.max(highest_K, 0, return_indices=True)
    rescale_K = tl.exp(highest_K - highest)
    normalizer = highest + tl.log(tl.sum(rescale_K * total_K, 0))
    temp = tl.load(temperature)
    token = tl.load(sums + 3 * plane + row * blocks + first).to(tl.int32)
    logprob = highest - normalizer
    if temp > 0:
        weight_K = rescale_K * kept_K
        cumulative_K = tl.cumsum(weight_K, 0)
        target = tl.load(uniform) * tl.sum(weight_K, 0)
        last = tl.max(tl.where(weight_K > 0, number, 0), 0)
        chosen = tl.minimum(tl.min(tl.where((cumulative_K > target) & (weight_K > 0), number, blocks_padded), 0), last)
        is_chosen = number == chosen
        weight = tl.sum(tl.where(is_chosen, weight_K, 0.0), 0)
        share = (target - (tl.sum(tl.where(is_chosen, cumulative_K, 0.0), 0) - weight)) / weight
        block_highest = tl.sum(tl.where(is_chosen, highest_K, 0.0), 0)
        token_index = chosen * block + inside
        in_range = token_index < vocabulary
        logit = tl.load(logits + row * logits_b + token_index, mask=in_range, other=0.0)
        x = _scaled(logit, temp, factor, cap)
        weights = tl.where(in_range, tl.exp(x - block_highest), 0.0)
        if is_filtered:
            weights = tl.where(logit >= tl.load(least + row), weights, 0.0)
        exceeds = (tl.cumsum(weights, 0) > share * tl.sum(weights, 0)) & (weights > 0)
        last_inside = tl.max(tl.where(weights > 0, inside, 0), 0)
        index = tl.minimum(tl.min(tl.where(exceeds, inside, block), 0), last_inside)
        token = (chosen * block + index).to(tl.int32)
        logprob = tl.sum(tl.where(inside == index, x, 0.0), 0) - normalizer
    return token, logprob
