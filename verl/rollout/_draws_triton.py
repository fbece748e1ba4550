"""Drawing tokens on the device, and what follows from them: two Triton kernels between one step of decoding and the next.

The first reads the logits once and leaves a few numbers of each block of the vocabulary; the second picks the block, reads it
again, picks the token, and writes down all that the next step needs. The rule is that of `verl.rollout._draws.draw`.

Dimensions: B slots in use, V vocabulary, K blocks of it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from verl.rollout._slots import State

BLOCK = 4096  # tokens of a block


def step(logits_BV: Tensor, state: State, temperature: Tensor, least_B: Tensor | None, factor: float, soft_cap: float | None) -> None:
    """Draw a token for each of the first B slots and write it down; slots that have ended stay as they are.

    Args:
        temperature: one number on the device; 0 takes the first of the likeliest tokens.
        least_B: the lowest of the logits, as they are in logits_BV, that may be drawn; None: all may.
        factor, soft_cap: what the architecture does to its logits (`LogitRule`).
    """
    rows, vocabulary = logits_BV.shape
    blocks = triton.cdiv(vocabulary, BLOCK)
    statistics_4BK = torch.empty(4, rows, blocks, dtype=torch.float32, device=logits_BV.device)
    least = logits_BV if least_B is None else least_B
    cap = 0.0 if soft_cap is None else soft_cap
    _statistics[(rows, blocks)](
        logits_BV, logits_BV.stride(0), least, temperature, statistics_4BK, rows, vocabulary, factor, cap,
        least_B is not None, BLOCK, num_warps=8,
    )  # fmt: skip
    _pick[(rows,)](
        logits_BV, logits_BV.stride(0), least, temperature, statistics_4BK, rows, vocabulary, blocks, factor, cap,
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
def _statistics(  # type: ignore[no-untyped-def]
    logits, logits_b, least, temperature, statistics, rows, vocabulary, factor, cap, is_cut: tl.constexpr, block: tl.constexpr
):  # fmt: skip
    row, number = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = number * block + tl.arange(0, block)
    there = token < vocabulary
    logit = tl.load(logits + row * logits_b + token, mask=there, other=0.0)
    x = tl.where(there, _scaled(logit, tl.load(temperature), factor, cap), float("-inf"))
    highest, where = tl.max(x, 0, return_indices=True)
    weights = tl.exp(x - tl.where(highest == float("-inf"), 0.0, highest))
    total = tl.sum(weights, 0)
    allowed = total
    if is_cut:
        allowed = tl.sum(tl.where(logit >= tl.load(least + row), weights, 0.0), 0)
    place = statistics + row * tl.num_programs(1) + number
    each = rows * tl.num_programs(1)
    tl.store(place, highest)
    tl.store(place + each, total)
    tl.store(place + 2 * each, allowed)
    tl.store(place + 3 * each, (number * block + where).to(tl.float32))  # exact below 2**24


@triton.jit
def _pick(  # type: ignore[no-untyped-def]
    logits, logits_b, least, temperature, statistics, rows, vocabulary, blocks, factor, cap,
    tokens, positions, generated, limits, active, answers, logprobs, uniforms, longest, stops, stop_count,
    stops_padded: tl.constexpr, is_cut: tl.constexpr, blocks_padded: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if tl.load(active + row) == 0:
        return
    number, inside = tl.arange(0, blocks_padded), tl.arange(0, block)
    place, each = statistics + row * blocks + number, rows * blocks
    highest_K = tl.load(place, mask=number < blocks, other=float("-inf"))
    total_K = tl.load(place + each, mask=number < blocks, other=0.0)
    allowed_K = tl.load(place + 2 * each, mask=number < blocks, other=0.0)
    highest, first = tl.max(highest_K, 0, return_indices=True)
    shrink_K = tl.exp(highest_K - highest)
    normalizer = highest + tl.log(tl.sum(shrink_K * total_K, 0))
    warmth = tl.load(temperature)
    count = tl.load(generated + row)
    token = tl.load(statistics + 3 * each + row * blocks + first).to(tl.int32)
    logprob = highest - normalizer
    if warmth > 0:
        weight_K = shrink_K * allowed_K
        cumulative_K = tl.cumsum(weight_K, 0)
        target = tl.load(uniforms + row * longest + count) * tl.sum(weight_K, 0)
        last = tl.max(tl.where(weight_K > 0, number, 0), 0)
        chosen = tl.minimum(tl.min(tl.where((cumulative_K > target) & (weight_K > 0), number, blocks_padded), 0), last)
        here = number == chosen
        weight = tl.sum(tl.where(here, weight_K, 0.0), 0)
        share = (target - (tl.sum(tl.where(here, cumulative_K, 0.0), 0) - weight)) / weight
        block_highest = tl.sum(tl.where(here, highest_K, 0.0), 0)
        at = chosen * block + inside
        there = at < vocabulary
        logit = tl.load(logits + row * logits_b + at, mask=there, other=0.0)
        x = _scaled(logit, warmth, factor, cap)
        weights = tl.where(there, tl.exp(x - block_highest), 0.0)
        if is_cut:
            weights = tl.where(logit >= tl.load(least + row), weights, 0.0)
        falls = (tl.cumsum(weights, 0) > share * tl.sum(weights, 0)) & (weights > 0)
        last_inside = tl.max(tl.where(weights > 0, inside, 0), 0)
        picked = tl.minimum(tl.min(tl.where(falls, inside, block), 0), last_inside)
        token = (chosen * block + picked).to(tl.int32)
        logprob = tl.sum(tl.where(inside == picked, x, 0.0), 0) - normalizer
    tl.store(answers + row * longest + count, token)
    tl.store(logprobs + row * longest + count, logprob)
    tl.store(generated + row, count + 1)
    stop = tl.arange(0, stops_padded)
    stopped = tl.max((tl.load(stops + stop, mask=stop < stop_count, other=-1) == token).to(tl.int32), 0)
    if (stopped > 0) | (count + 1 >= tl.load(limits + row)):
        tl.store(active + row, 0)
    else:
        tl.store(tokens + row, token.to(tl.int64))
        tl.store(positions + row, tl.load(positions + row) + 1)
